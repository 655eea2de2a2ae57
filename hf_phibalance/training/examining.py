"""`doctor`: a model or a trainer examined by the first step that it would take, which leaves no trace."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer

from ..balancing import PhiBalancer, RandomState, find_patch
from ..checkup import (
    Check,
    DoctorReport,
    Kept,
    Observation,
    RawStep,
    Subject,
    made_batch,
    observe,
    run_checks,
)
from ..routers import unwrap
from .callback import PhiBalanceCallback, adds_auxiliary_loss
from .refusals import refuse_unknown_scaling


CONTAINERS = (dict, collections.defaultdict, collections.OrderedDict, list, collections.deque, set)
WORSE = {"ok": 0, "warning": 1, "problem": 2}


def doctor(
    subject: nn.Module | Trainer, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> DoctorReport:
    """
    Examines a set-up before a long training: measures the coefficient that one optimizer step really receives, and names
    every problem with its remedy. Takes about as long as four optimizer steps, and changes nothing: weights, gradients,
    random numbers, duals, trainer and data are as before.

    ```python
    report = phb.doctor(trainer)  # before trainer.train(); on every rank
    print(report)
    ```

    Args:
        subject (`torch.nn.Module` or `transformers.Trainer`):
            A trainer is examined by its own first step: its batches, accumulation, loss and ranks. A model, by a step of
            its loss on `batch`.
        batch (`Mapping` or `Sequence[Mapping]`, *optional*):
            For a model: one micro-batch or several, as it receives them; made tokens unless given.

    Returns:
        `DoctorReport`: `print` it; `report.problems`, `report.coefficient`, `report.to_dict()`.

    Raises:
        ValueError: if `batch` is given with a trainer.
    """
    if not isinstance(subject, Trainer):
        return _examine_model(subject, batch)
    if batch is not None:
        raise ValueError(
            "`batch` is for a model; a trainer is examined on the first batches of its own. Leave it out."
        )
    return _examine_trainer(subject)


# ---------------------------------------------------------------------- a model


def _examine_model(model: nn.Module, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None) -> DoctorReport:
    present = find_patch(model)
    root = unwrap(model)[-1]
    batches = [made_batch(model)] if batch is None else [batch] if isinstance(batch, Mapping) else list(batch)
    subject = Subject(root, None if present is None else present.balancer, folder=_folder(root), batches=batches)
    if subject.balancer is not None:
        rows = [next((len(v) for v in b.values() if hasattr(v, "__len__")), 0) for b in batches]
        given = (
            f"{'made tokens' if batch is None else 'the given texts'}, {len(rows)} micro-batch{'es' * (len(rows) > 1)}"
        )
        step = RawStep(
            model, subject.balancer, batches, f"one step of the model's loss on {given} of {max(rows)} rows"
        )
        subject.seen = observe(model, subject.balancer, step)
    return _report(subject)


def _report(subject: Subject) -> DoctorReport:
    seen, config = subject.seen, getattr(subject.root, "config", None)
    model = {
        "class": type(subject.root).__name__,
        "model_type": getattr(config, "model_type", None),
        "routers": 0 if subject.balancer is None else len(subject.balancer.sites),
        "config": None if subject.balancer is None else subject.balancer.config.to_dict(),
    }
    measured = "nothing was run" if seen is None else seen.what
    return DoctorReport(run_checks(subject), measured, None if seen is None else seen.coefficient, model)


def _folder(root: nn.Module) -> Path | None:
    name = getattr(root, "name_or_path", "")
    return Path(name) if name and Path(name).is_dir() else None


# ---------------------------------------------------------------------- a trainer


class TrainerStep:
    """
    An optimizer step of `trainer`, as its own loop takes it.

    Args:
        trainer (`transformers.Trainer`): after it has prepared its model.
        batches (`Sequence`): the micro-batches of the step, as the dataloader made them.
        items (`torch.Tensor` or `int`, *optional*): tokens with labels in them, as the trainer counted them.
    """

    def __init__(self, trainer: Any, batches: Sequence[Any], items: Any) -> None:
        self.trainer, self.batches, self.items = trainer, batches, items
        ranks, count = trainer.args.world_size, len(batches)
        self.what = (
            f"the first optimizer step of {type(trainer).__name__}, {count} micro-batch{'es' * (count > 1)}"
            + (f" on each of {ranks} ranks" if ranks > 1 else "")
        )
        self._prepared: list[tuple[Any, RandomState]] = []  # what the model got; made once, since it may be generated
        self.lowered: float | None = None

    @property
    def loss_scale(self) -> float:
        scaler = self.trainer.accelerator.scaler
        return scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0

    def lower_loss_scale(self) -> bool:
        if self.loss_scale <= 1:
            return False
        self.lowered = max(self.loss_scale / 256, 1.0)
        self.trainer.accelerator.scaler._scale = torch.full((), self.lowered, device=self.trainer.args.device)
        return True

    def run(self) -> None:
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(self.batches)
        with Contents(trainer, trainer.state):
            self._reuse_inputs()
            for number, batch in enumerate(self.batches):
                is_last = number == len(self.batches) - 1
                trainer.accelerator.gradient_state._set_sync_gradients(is_last)
                model = trainer.model_wrapped
                with nullcontext() if is_last else trainer.accelerator.no_sync(model=model):
                    trainer.training_step(model, _copy(batch), self.items)

    def _reuse_inputs(self) -> None:
        """Lets the trainer make the model's inputs in the first run only: those of GRPO are generated, and rewarded."""
        prepare, recorded, position = self.trainer._prepare_inputs, bool(self._prepared), iter(list(self._prepared))

        def prepare_once(batch: Any) -> Any:
            if recorded:
                inputs, after = next(position)
                after.restore()
            else:
                inputs = prepare(batch)
                self._prepared.append((inputs, RandomState()))
            return _copy(inputs)

        self.trainer._prepare_inputs = prepare_once


class Contents:
    """
    The attributes of objects, and what is in their containers, put back at the end.

    Args:
        owners: the objects; datasets among their attributes are left alone.
    """

    def __init__(self, *owners: Any) -> None:
        self.owners = owners

    def __enter__(self) -> Contents:
        self._attributes = [(owner, dict(vars(owner))) for owner in self.owners]
        self._containers: list[tuple[Any, Any]] = []
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if "dataset" not in name:
                    self._note(value, depth=4)
        return self

    def _note(self, value: Any, depth: int) -> None:
        if type(value) not in CONTAINERS or depth == 0 or any(value is noted for noted, _ in self._containers):
            return
        self._containers.append((value, value.copy()))
        for entry in value.values() if isinstance(value, dict) else value:
            self._note(entry, depth - 1)

    def __exit__(self, *exception: object) -> None:
        for container, kept in self._containers:
            container.clear()
            (container.extend if isinstance(container, (list, collections.deque)) else container.update)(kept)
        for owner, attributes in self._attributes:
            vars(owner).clear()
            vars(owner).update(attributes)


def verify_first_step(trainer: Any, callback: PhiBalanceCallback, batches: Sequence[Any], items: Any) -> DoctorReport:
    """Examines `trainer` inside its `train()`, when the micro-batches of a step have been drawn; on every rank."""
    subject = _subject_of(trainer, callback)
    subject.batches = [batch for batch in batches if isinstance(batch, Mapping)]
    balancer, scaler = subject.balancer, trainer.accelerator.scaler
    if balancer is not None and not subject.unmeasured:
        with ExitStack() as stack:
            stack.enter_context(Contents(trainer, trainer.state, trainer.accelerator, *([scaler] if scaler else [])))
            step = TrainerStep(trainer, batches, items)
            synchronised = trainer.accelerator.gradient_state.sync_gradients
            if not balancer.is_open:
                balancer.begin_step(trainer.args.gradient_accumulation_steps, loss_scale=callback.loss_scale)
                stack.callback(balancer.discard_step)
            subject.seen = observe(trainer.model_wrapped, balancer, step)
            trainer.accelerator.gradient_state._set_sync_gradients(synchronised)
    return _of_all_ranks(_report(subject))


def _subject_of(trainer: Any, callback: PhiBalanceCallback | None) -> Subject:
    present, root = find_patch(trainer.model), unwrap(trainer.model)[-1]
    balancer: PhiBalancer | None = None if present is None else present.balancer
    wiring = "none" if callback is None else "attached" if callback.attached else "callback"
    auxiliary = getattr(trainer, "router_aux_loss_coef", 0.0) if getattr(trainer, "aux_loss_enabled", False) else 0.0
    if wiring == "callback" and adds_auxiliary_loss(trainer.args, trainer.model):
        auxiliary = getattr(trainer.args, "router_aux_loss_coef", None) or auxiliary
    try:
        refuse_unknown_scaling(trainer, None if balancer is None else balancer.process_group)
        parallel = ""
    except ValueError as error:
        parallel = str(error)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    sharded |= bool(getattr(trainer, "is_distributed_loading_by_transformers", False))
    unmeasured = (
        "parameters and gradients are sharded, and a trial would not leave them as they are" if sharded else ""
    )
    if getattr(trainer.args, "use_vllm", False):
        unmeasured = "vLLM generates the completions, and its random numbers cannot be put back"
    tokenizer = getattr(trainer, "processing_class", None)
    return Subject(
        root,
        balancer,
        trainer=type(trainer).__name__,
        wiring=wiring,
        auxiliary=auxiliary or 0.0,
        parallel=parallel,
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
        folder=_folder(root),
        unmeasured=parallel or unmeasured,
    )


def _of_all_ranks(report: DoctorReport) -> DoctorReport:
    """The worst of what the ranks found, the same on all of them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return report
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, report.checks)
    worst: dict[str, Check] = {}
    for rank, checks in enumerate(gathered):
        for check in checks:
            if check.name not in worst or WORSE[check.status] > WORSE[worst[check.name].status]:
                where = f"rank {rank}: " if rank else ""
                worst[check.name] = dataclasses.replace(check, finding=where + check.finding)
    return dataclasses.replace(report, checks=list(worst.values()))


class _Examined(BaseException):
    """Ends the `train()` that an examination has started; no error, so that nothing handles it."""


def _examine_trainer(trainer: Any) -> DoctorReport:
    callback = next((c for c in trainer.callback_handler.callbacks if isinstance(c, PhiBalanceCallback)), None)
    subject = _subject_of(trainer, callback)
    if subject.balancer is None or callback is None or subject.unmeasured:
        return _of_all_ranks(_report(subject))
    reports: list[DoctorReport] = []
    draw, root = trainer.get_batch_samples, unwrap(trainer.model)[-1]

    def examine(*args, **kwargs):
        batches, items = draw(*args, **kwargs)
        reports.append(verify_first_step(trainer, callback, batches, items))
        raise _Examined

    optimizer = trainer.optimizer
    gradient_state = trainer.accelerator.gradient_state
    kept = Contents(trainer, trainer.state, trainer.accelerator, trainer.callback_handler, callback, trainer.control)
    shallow = [vars(module) for module in {id(m): m for m in (trainer.model, root)}.values()]
    shallow += [vars(root.config), gradient_state._shared_state] + ([] if optimizer is None else [vars(optimizer)])
    groups = [] if optimizer is None else [(group, dict(group)) for group in optimizer.param_groups]
    values = [(owner, dict(owner)) for owner in shallow]
    with Kept(trainer.model), kept:
        trainer.callback_handler.callbacks = [callback]  # not the user's: they may log, or wait for the end
        callback.verifies = False
        trainer.get_batch_samples = examine
        try:
            trainer.train()
        except _Examined:
            pass
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            what = f"the start of {type(trainer).__name__}.train()"
            subject.seen = Observation(what, error=f"{type(error).__name__}: {error}")
            reports.append(_of_all_ranks(_report(subject)))
        finally:
            _take_out_neftune(trainer)
    for owner, contents in [*values, *groups]:
        owner.clear()
        owner.update(contents)
    return reports[0]


def _take_out_neftune(trainer: Any) -> None:
    """The noise that `train()` has put into the embeddings; the next one will put it there again."""
    handle = getattr(trainer, "neftune_hook_handle", None)
    if handle is not None:
        handle.remove()
        root: Any = unwrap(trainer.model)[-1]
        root.get_input_embeddings().__dict__.pop("neftune_noise_alpha", None)


def _copy(batch: Any) -> Any:
    """`batch`, so that what is taken out of it or put into it stays there."""
    return dict(batch) if isinstance(batch, dict) else batch
