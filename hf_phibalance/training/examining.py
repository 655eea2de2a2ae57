"""`doctor` and `attach(verify=True)`: examine a set-up by one optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer
from transformers.utils import logging

from ..balancing import PhiBalancer, RandomState, find_balancer
from ..diagnosis import Check, DoctorReport, StepRecorder, Subject, eager, made_batch, run_checks, try_step
from ..routers import unwrap
from .calibrating import _inputs, leaving_order
from .callback import PhiBalanceCallback
from .generated import generates
from .refusals import refuse_unknown_scaling


logger = logging.get_logger(__name__)
WORSE = {"ok": 0, "warning": 1, "problem": 2}


def doctor(
    subject: nn.Module | Trainer, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> DoctorReport:
    """
    Examines a set-up before a long training: runs the forward and backward of one step with known prices, measures the
    coefficient that it receives, and names every problem with its remedy. Restores weights, gradients, random numbers, duals,
    trainer and data. `attach(trainer, verify=True)` also measures a step of the training itself, and so what the trainer's own
    loop does to tokens and gradients.

    ```python
    report = phb.doctor(trainer)  # before trainer.train(); on every rank
    print(report)
    ```

    Args:
        subject (`torch.nn.Module` or `transformers.Trainer`):
            A model is run on `batch`. A trainer's model is run on the first batch of its data, or on random tokens if the model
            does not take this batch as it is.
        batch (`Mapping` or `Sequence[Mapping]`, *optional*):
            For a model: one micro-batch or several, as it receives them; defaults to random tokens.

    Returns:
        `DoctorReport`: `print` it; `report.problems`, `report.coefficient`, `report.to_dict()`.

    Raises:
        ValueError: if `batch` is given with a trainer.
    """
    if isinstance(subject, Trainer):
        if batch is not None:
            raise ValueError(
                "`batch` is for a model; a trainer is examined on the first batch of its own. Leave it out."
            )
        return _examine_trainer(subject)
    found = Subject(unwrap(subject)[-1], find_balancer(subject))
    batches = [made_batch(subject)] if batch is None else [batch] if isinstance(batch, Mapping) else list(batch)
    if found.balancer is not None:
        rows = max(next((len(v) for v in each.values() if hasattr(v, "__len__")), 0) for each in batches)
        given = "made tokens" if batch is None else "the given texts"
        what = f"{given}, {len(batches)} micro-batch{'es' * (len(batches) > 1)} of {rows} rows"
        found.seen = try_step(subject, found.balancer, batches, f"one step of the model's loss on {what}")
    return _report(found)


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


def _examine_trainer(trainer: Any) -> DoctorReport:
    subject = _subject_of(trainer, find_balancer(trainer.model))
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        subject.unmeasured = "parameters and gradients will be sharded"
    subject.unmeasured = subject.parallel or subject.unmeasured
    if subject.balancer is not None and not subject.unmeasured:
        batch, error = _first_batch(trainer)
        given = "made tokens" if batch is None else "the first batch"
        ranks = f" on each of {trainer.args.world_size} ranks" if trainer.args.world_size > 1 else ""
        what = f"one step of the model's loss on {given} of {type(trainer).__name__}{ranks}"
        with trainer.accelerator.autocast():
            batches = [made_batch(trainer.model) if batch is None else batch]
            subject.seen = try_step(trainer.model, subject.balancer, batches, what)
        subject.seen.error = error or subject.seen.error
    return _of_all_ranks(_report(subject))


def _first_batch(trainer: Any) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the first batch of the trainer's data, `None` if the model does not take it; and the error in making it."""
    if generates(trainer) or trainer.train_dataset is None:
        return None, None
    random, prepared = RandomState(), len(trainer.accelerator._dataloaders)
    try:
        loader = trainer.get_train_dataloader()
        with leaving_order(loader):
            batch = trainer._prepare_inputs(next(iter(loader)))
    except (ValueError, RuntimeError, TypeError, KeyError) as failure:
        return None, f"the first batch could not be made: {type(failure).__name__}: {failure}"
    finally:
        random.restore()
        del trainer.accelerator._dataloaders[prepared:]
    if not isinstance(batch, Mapping) or not {"input_ids", "inputs_embeds"} & set(batch):
        return None, None
    return _inputs(batch, unwrap(trainer.model)[-1]), None


def _subject_of(trainer: Any, balancer: PhiBalancer | None) -> Subject:
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, PhiBalanceCallback)]
    is_attached = any(callback.detach is not None for callback in callbacks)
    adds_loss = is_attached and getattr(trainer, "aux_loss_enabled", False)
    try:
        refuse_unknown_scaling(trainer, None if balancer is None else balancer.process_group)
        parallel = ""
    except ValueError as error:
        parallel = str(error)
    args = trainer.args
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", True)
    return Subject(
        unwrap(trainer.model)[-1],
        balancer,
        trainer=type(trainer).__name__,
        is_attached=is_attached,
        auxiliary=getattr(trainer, "router_aux_loss_coef", 0.0) if adds_loss else 0.0,
        parallel=parallel,
        engine="vLLM" if getattr(args, "use_vllm", False) else "",
        checkpointing=reentrant if args.gradient_checkpointing else None,
        pad_token_id=getattr(getattr(trainer, "processing_class", None), "pad_token_id", None),
    )


def _of_all_ranks(report: DoctorReport) -> DoctorReport:
    """Returns the worst result of each check over the ranks, on all of them."""
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


@contextmanager
def verifying(trainer: Any, callback: PhiBalanceCallback, balancer: PhiBalancer | None, inputs: Any) -> Iterator[None]:
    """
    Context manager around the training on a micro-batch. Runs the first steps uncompiled and records them, until one has prices and
    finite gradients. After its last micro-batch and before its optimizer it sets `callback.report`, or raises `ValueError` if there
    is a problem.
    """
    if balancer is not None and callback.report is None and not balancer.is_trained_on:  # the step begins
        StepRecorder(balancer, f"optimizer step {trainer.state.global_step + 1} of {type(trainer).__name__}").start()
    recorder: StepRecorder | None = None if balancer is None else balancer.forwards.recorder
    if balancer is None or recorder is None:
        yield
        return
    recorder.batches.append(inputs)
    try:
        with eager(trainer.model_wrapped):
            yield
    except BaseException:
        recorder.stop()
        raise
    if not trainer.accelerator.sync_gradients:
        return
    number, ranks = len(recorder.batches), trainer.args.world_size
    recorder.what += f", {number} micro-batch{'es' * (number > 1)}"
    recorder.what += f" on each of {ranks} ranks" if ranks > 1 else ""
    scaler: Any = getattr(trainer.accelerator, "scaler", None)
    scales = scaler is not None and scaler.is_enabled()
    recorder.finish(scaler.get_scale() if scales else None)
    is_last = trainer.state.global_step + 1 >= trainer.state.max_steps
    if not is_last and scales and not recorder.is_finite:
        return  # the optimizer will skip this step
    subject = _subject_of(trainer, balancer)
    subject.seen, subject.is_real = recorder, True
    report = _of_all_ranks(_report(subject))
    if report.problems:
        callback.report = report
        balancer.discard_step()
        raise ValueError(f"verify=True found what makes this training go wrong. {report}")
    if is_last or not recorder.is_early:
        callback.report = report
        if trainer.is_world_process_zero():
            (logger.info if report.status == "ok" else logger.warning)(str(report))
