"""`audit`: measures the built-in auxiliary loss of a training that was not patched."""

from __future__ import annotations

import copy
import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..balancing import find_balancer
from ..diagnosis import AuditReport, Declared, StockRecorder, explain
from ..routers import predicts_tokens, unwrap
from .batches import leaving_order
from .examining import counted, eager, leaving_no_trace, losses, micro_batches, refuse_unknown_scaling


IN_ARGUMENTS = ("router_aux_loss_coef", "moe_aux_loss_coef")  # of TRL and ms-swift, and of LLaMA-Factory
IN_CONFIG = ("router_aux_loss_coef", "aux_loss_coef")


def audit(
    subject: nn.Module | Trainer, batch: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> AuditReport:
    """
    Measures which coefficient of the built-in auxiliary loss (`router_aux_loss_coef`) really arrives at the routers, and
    says why it is not the declared one. Needs no patch. Runs the trainer's own loop up to its first optimizer step, with
    its batches, accumulation, ranks, checkpointing and precision, but without its callbacks. The step is not taken.
    Restores model, trainer, random numbers and the order of the data.

    ```python
    report = phb.audit(trainer)  # before trainer.train(); on every rank
    print(report)
    ```

    Args:
        subject (`torch.nn.Module` or `transformers.Trainer`):
            A trainer, or a model. The loss of a model is its own, divided by the number of micro-batches.
        batch (`Mapping` or `Sequence[Mapping]`, *optional*):
            For a model: one micro-batch or several, as it receives them; defaults to random tokens.

    Returns:
        `AuditReport`: `print` it; `report.declared`, `report.received`, `report.ratio`, `report.checks`, `report.to_dict()`.

    Raises:
        ValueError: if the model is φ-balanced, if the loop would shard it, if a batch has no labels, or if a stream of training
            data cannot be copied.
    """
    trainer = subject if isinstance(subject, Trainer) else None
    model: Any = subject if trainer is None else trainer.model
    if find_balancer(model) is not None:
        raise ValueError(
            "the model is φ-balanced or watched, and balancing switches its built-in loss off: audit it before phb.patch or "
            "phb.watch, or call phb.doctor(...) to measure the coefficient of balancing."
        )
    if trainer is not None and batch is not None:
        raise ValueError("`batch` is for a model; a trainer is audited on batches of its own. Leave it out.")
    seen, measured = _record_model(model, batch) if trainer is None else _record_trainer(trainer)
    return explain(seen, _declared(model, trainer), measured)


def _record_model(model: nn.Module, batch: Any) -> tuple[StockRecorder, str]:
    """Records one step of the model's own loss. Returns the recorder, and names the step."""
    recorder = StockRecorder(model)
    batches = micro_batches(model, batch)
    if predicts_tokens(recorder.root) and not all("labels" in each for each in batches):
        raise ValueError(
            "a batch has no `labels`, so the model computes no loss: add them, for example a copy of input_ids."
        )
    with _restoring(model, _objects(model)), eager(model), recorder.recording():
        for loss in losses(model, batches):
            loss.backward()
            recorder.settle()
    return recorder.finish(), f"one step of the model's own loss on {counted(len(batches))}"


class _StepReached(Exception):
    """Ends the loop before its first optimizer step."""


class _StopBeforeStep(TrainerCallback):
    def __init__(self, recorder: StockRecorder) -> None:
        self._recorder = recorder

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._recorder.settle()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise _StepReached


def _record_trainer(trainer: Any) -> tuple[StockRecorder, str]:
    """Records the first step of the trainer's loop, and ends the loop. Returns the recorder, and names the step."""
    model, accelerator = trainer.model, trainer.accelerator
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "FSDP and DeepSpeed shard the model when training begins, which cannot be undone: audit the same script without "
            "them, with a tiny model of the family (phb.models.tiny) if this one does not fit. The loss is scaled alike."
        )
    refuse_unknown_scaling(trainer, None)
    pad = getattr(getattr(trainer, "processing_class", None), "pad_token_id", None)
    recorder = StockRecorder(model, model.config.get_text_config().pad_token_id if pad is None else pad)
    objects = [trainer, trainer.args, accelerator, accelerator.gradient_state, *_objects(model)]
    objects += [trainer.data_collator] if hasattr(trainer.data_collator, "__dict__") else []
    with _restoring(model, objects), eager(model):
        trainer.args.eval_on_start = False
        trainer.model_init = trainer.lr_scheduler = None
        trainer.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        callbacks = [DefaultFlowCallback(), _StopBeforeStep(recorder)]
        trainer.callback_handler = CallbackHandler(callbacks, model, None, None, None)
        trainer.train_dataset = _unread(trainer.train_dataset)
        loader = trainer.get_train_dataloader()
        trainer.get_train_dataloader = lambda: loader
        with leaving_order(loader), recorder.recording(), suppress(_StepReached):
            trainer.train()
        scaler = getattr(accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
        recorder.finish(
            lambda sums: accelerator.reduce(sums.to(accelerator.device, dtype), "sum").cpu().double(), scale
        )
    number = counted(recorder.forwards, recorder.ranks)
    return recorder, f"the first optimizer step of {type(trainer).__name__}, {number}"


def _unread(dataset: Any) -> Any:
    """Returns a copy of a stream, which may go on where it was left. Another dataset is returned itself."""
    if not isinstance(dataset, IterableDataset):
        return dataset
    try:
        return copy.deepcopy(dataset)
    except TypeError as error:
        raise ValueError(
            f"the training data, a {type(dataset).__name__}, cannot be copied ({error}), and the audit would take its first "
            "rows from the training: audit another trainer, with such a dataset of its own."
        ) from error


def _declared(model: nn.Module, trainer: Any) -> Declared:
    """Returns where a coefficient is declared: in the trainer's arguments, by the trainer itself, in the config."""
    root: Any = unwrap(model)[-1]
    config, args = root.config.get_text_config(), getattr(trainer, "args", None)
    is_enabled = getattr(trainer, "aux_loss_enabled", False)  # TRL
    given = {name: getattr(args, name, None) for name in IN_ARGUMENTS}
    sources = {f"{type(args).__name__}.{name}": float(value) for name, value in given.items() if value is not None}
    is_default = is_enabled and all(value == getattr(type(args), name, None) for name, value in given.items())
    if is_enabled and not sources:
        sources[f"{type(trainer).__name__}.router_aux_loss_coef"] = float(trainer.router_aux_loss_coef)
    by_trainer = next(reversed(sources.values()), None)
    by_model = 0.0
    for name in IN_CONFIG:
        if hasattr(config, name):
            sources[f"config.{name}"] = by_model = float(getattr(config, name))
        if hasattr(root, name):  # its own copy, which it multiplies by
            by_model = float(getattr(root, name))
            sources.setdefault(f"config.{name}", by_model)  # dbrx: in another config
    return Declared(
        by_model=by_model,
        is_on=bool(getattr(config, "output_router_logits", False)),
        sources=sources,
        by_trainer=by_trainer,
        is_default=is_default,
        trainer="the loop" if trainer is None else type(trainer).__name__,
        model=type(root).__name__,
    )


# ---------------------------------------------------------------------- leaving no trace


def _objects(model: nn.Module) -> list[Any]:
    """Returns the modules of `model` and their configs: training sets flags, hooks and special tokens in them."""
    modules = list(model.modules())
    names = ("config", "generation_config")
    configs = {
        id(vars(module)[name]): vars(module)[name] for module in modules for name in names if name in vars(module)
    }
    return [*modules, *(config for config in configs.values() if config is not None)]


@contextmanager
def _restoring(model: nn.Module, objects: Sequence[Any]) -> Iterator[None]:
    """Context manager: leaves no trace in `model`, and restores the attributes of `objects` and the containers in them."""
    attributes = [(vars(each), dict(vars(each))) for each in objects]
    containers = [pair for _, values in attributes for value in values.values() for pair in _containers(value)]
    with leaving_no_trace(model):
        try:
            yield
        finally:
            for target, before in (*containers, *attributes):
                _refill(target, before)
    gc.collect()  # a DDP wrapper that is still there would reduce gradients again


def _containers(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields `value` and the containers in it, each with a copy."""
    if isinstance(value, (dict, list, set, deque)):
        yield value, copy.copy(value)
    if isinstance(value, dict):
        for part in value.values():
            yield from _containers(part)


def _refill(target: Any, before: Iterable[Any]) -> None:
    if isinstance(target, (dict, set)):
        target.clear()
        target.update(before)
    elif list(target) != list(before) or isinstance(target, deque):
        target.clear()
        target.extend(before)
