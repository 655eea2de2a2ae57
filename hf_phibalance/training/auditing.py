"""`audit`: measures the built-in auxiliary loss of a training that was not patched."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..balancing import RandomState, find_balancer
from ..diagnosis import AuditReport, Declared, StockRecorder, explain
from ..routers import unwrap
from .batches import leaving_order
from .examining import eager, made_batch, refuse_unknown_scaling


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
        ValueError: if the model is φ-balanced, or if the loop would shard it.
    """
    trainer = subject if isinstance(subject, Trainer) else None
    model: Any = subject if trainer is None else trainer.model
    if find_balancer(model) is not None:
        raise ValueError(
            "the model is φ-balanced, which switches its built-in loss off: audit it before phb.patch(model), or call "
            "phb.doctor(...) to measure the coefficient of balancing."
        )
    if trainer is None:
        batches = [made_batch(model)] if batch is None else [batch] if isinstance(batch, Mapping) else list(batch)
        recorder = StockRecorder(model)
        with _restoring(model, [*_objects(model)]), eager(model), recorder.recording():
            _run(model, batches, recorder)
        measured = f"one step of the model's own loss on {len(batches)} micro-batch{'es' * (len(batches) > 1)}"
        return explain(recorder.finish(), _declared(model, None), measured, _described(model))
    if batch is not None:
        raise ValueError("`batch` is for a model; a trainer is audited on batches of its own. Leave it out.")
    return _audit_trainer(trainer)


def _run(model: nn.Module, batches: Sequence[Mapping[str, Any]], recorder: StockRecorder) -> None:
    """Runs the forwards and backwards of one step of the model's own loss."""
    model.train()
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    for batch in batches:
        output = model(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()})
        loss = getattr(output, "loss", None)
        (output[0].float().mean() if loss is None else loss / len(batches)).backward()
        recorder.settle()


class _StepReached(Exception):
    """Ends the loop before its first optimizer step."""


class _StopBeforeStep(TrainerCallback):
    def __init__(self, recorder: StockRecorder) -> None:
        self._recorder = recorder

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._recorder.settle()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise _StepReached


def _audit_trainer(trainer: Any) -> AuditReport:
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
    with _restoring(model, objects), eager(model):
        trainer.args.eval_on_start = False
        trainer.model_init = trainer.lr_scheduler = None
        trainer.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        trainer.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), _StopBeforeStep(recorder)], model, None, None, None
        )
        loader = trainer.get_train_dataloader()
        trainer.get_train_dataloader = lambda: loader
        with leaving_order(loader), recorder.recording(), suppress(_StepReached):
            trainer.train()
        scaler = getattr(accelerator, "scaler", None)
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        device = torch.float32 if accelerator.device.type == "mps" else torch.float64
        seen = recorder.finish(
            lambda sums: accelerator.reduce(sums.to(accelerator.device, device), "sum").cpu().double(), scale
        )
    ranks = f" on each of {seen.ranks} ranks" if seen.ranks > 1 else ""
    number = f"{seen.forwards} micro-batch{'es' * (seen.forwards > 1)}"
    measured = f"the first optimizer step of {type(trainer).__name__}, {number}{ranks}"
    return explain(seen, _declared(model, trainer), measured, _described(model))


def _described(model: nn.Module) -> dict[str, Any]:
    root = unwrap(model)[-1]
    return {"class": type(root).__name__, "model_type": getattr(root.config, "model_type", None)}


def _declared(model: nn.Module, trainer: Any) -> Declared:
    """Returns where a coefficient is declared: in the trainer's arguments, by the trainer itself, in the config."""
    root: Any = unwrap(model)[-1]
    config = root.config.get_text_config()
    sources: dict[str, float] = {}
    is_default, by_trainer = False, None
    if trainer is not None:
        args = trainer.args
        defaults = {f.name: f.default for f in dataclasses.fields(args)} if dataclasses.is_dataclass(args) else {}
        is_enabled = getattr(trainer, "aux_loss_enabled", False)
        for name in IN_ARGUMENTS:
            value = getattr(args, name, None)
            if value is not None:
                sources[f"{type(args).__name__}.{name}"] = by_trainer = float(value)
                is_default = is_enabled and value == defaults.get(name)
        if is_enabled and by_trainer is None:
            by_trainer, is_default = float(trainer.router_aux_loss_coef), True
            sources[f"{type(trainer).__name__}.router_aux_loss_coef"] = by_trainer
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


def _objects(model: nn.Module) -> Iterator[Any]:
    """Yields the modules of `model` and their configs: training sets flags, hooks and special tokens in them."""
    configs = {}
    for module in model.modules():
        yield module
        for name in ("config", "generation_config"):
            found = vars(module).get(name)
            if found is not None:
                configs[id(found)] = found
    yield from configs.values()


@contextmanager
def _restoring(model: nn.Module, objects: Sequence[Any]) -> Iterator[None]:
    """Restores attributes of `objects` and the containers in them, gradients and buffers of `model`, and random numbers."""
    random = RandomState()
    attributes = [(vars(each), dict(vars(each))) for each in objects]
    containers = [pair for _, values in attributes for value in values.values() for pair in _containers(value)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for target, before in (*containers, *attributes):
            _refill(target, before)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.restore()
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
