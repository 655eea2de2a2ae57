"""Wiring φ-balancing into a trainer: exact token counts, metrics in every reporter, what is off meanwhile or refused."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch.distributed as dist
from transformers import Trainer

from ..balancing import PhiBalancer, announce_switched_off, find_patch, get_balancer, patch
from ..publishing import complete_uploads
from .callback import PhiBalanceCallback
from .checkpoints import keep_whole


def attach(trainer: Trainer, process_group: dist.ProcessGroup | None = None) -> PhiBalanceCallback:
    """
    Wires φ-balancing into `trainer`, whose model must be patched: duals, exact token counts, metrics in every reporter
    and in `log_history`, loads of evaluations, state in checkpoints. A run that was killed, at whatever moment, resumes
    from its newest complete checkpoint. Works with any subclass of `Trainer`; calling it again returns the same callback.

    Args:
        trainer (`transformers.Trainer`): the trainer, before `train()`.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The data-parallel ranks, if they are not simply all ranks (tensor, context or sequence parallelism).

    Returns:
        `PhiBalanceCallback`: the callback in use; its `history` holds the loads at each logging step.

    Raises:
        ValueError: if the model is not patched, or the way of training cannot keep the promise of an exact coefficient.
    """
    callback = next((c for c in trainer.callback_handler.callbacks if isinstance(c, PhiBalanceCallback)), None)
    if callback is not None and callback.attached:
        return callback
    model: Any = trainer.model
    is_on = get_balancer(model).config.is_on
    _refuse_unknown_scaling(trainer, process_group)
    if callback is None:
        callback = PhiBalanceCallback()
        trainer.add_callback(callback)
    callback.attached = True
    if is_on:
        _switch_off_trainer_loss(trainer)
    patch(model)

    get_batch_samples, log, evaluate = trainer.get_batch_samples, trainer.log, trainer.evaluate
    load_optimizer: Any = trainer._load_optimizer_and_scheduler

    def current() -> PhiBalancer | None:
        """The balancer of the model as it is now: patched again with another configuration, or not any more."""
        present = find_patch(cast(Any, trainer.model))
        if present is None:
            return None
        present.balancer.process_group = process_group
        return present.balancer

    @functools.wraps(get_batch_samples)
    def counted_batch_samples(*args, **kwargs):
        batches, items = get_batch_samples(*args, **kwargs)
        if process_group is None:  # else ranks may share a model that nothing wraps
            _refuse_ranks_apart(trainer)
        balancer = current()
        if batches and balancer is not None:
            balancer.begin_step(_model_inputs(batches), loss_scale=callback.loss_scale)
        return batches, items

    @functools.wraps(log)
    def log_with_metrics(logs, *args, **kwargs):
        balancer = current()
        if balancer is not None:
            logs.update(_metrics_for(logs, balancer, callback, trainer))
        return log(logs, *args, **kwargs)

    @functools.wraps(evaluate)
    def counted_evaluate(*args, **kwargs):
        balancer = current()
        with nullcontext() if balancer is None else balancer.evaluation():
            return evaluate(*args, **kwargs)

    @functools.wraps(load_optimizer)
    def noted_load(checkpoint, *args, **kwargs):
        callback.resumed_from = checkpoint
        return load_optimizer(checkpoint, *args, **kwargs)

    wrappers = {
        "get_batch_samples": counted_batch_samples,
        "log": log_with_metrics,
        "evaluate": counted_evaluate,
        "_load_optimizer_and_scheduler": noted_load,
    }
    for name, wrapper in wrappers.items():
        setattr(trainer, name, wrapper)
    keep_whole(trainer, callback, current)
    complete_uploads(trainer, callback.history)
    return callback


def _switch_off_trainer_loss(trainer: Any) -> None:
    """TRL's trainers add an auxiliary loss of their own to any MoE."""
    if getattr(trainer, "aux_loss_enabled", False):
        announce_switched_off()
        trainer.aux_loss_enabled = False
        trainer.router_aux_loss_coef = 0.0


def _model_inputs(batches: Sequence[Any]) -> list[Mapping[str, Any]]:
    return [batch if isinstance(batch, Mapping) else {} for batch in batches]


def _metrics_for(
    logs: dict[str, float], balancer: PhiBalancer, callback: PhiBalanceCallback, trainer: Trainer
) -> dict[str, float]:
    if balancer.is_evaluating:
        prefix = next((key.removesuffix("_runtime") for key in logs if key.endswith("_runtime")), "eval")
        values = balancer.eval_metrics(callback.per_layer)
        return {f"{prefix}_moe/{key}": value for key, value in values.items()}
    if "loss" in logs and trainer.is_world_process_zero():
        return callback.training_metrics(trainer.state)
    return {}


def _refuse_ranks_apart(trainer: Trainer) -> None:
    """A `Trainer` that has evaluated before it trains leaves the model out of `DistributedDataParallel`."""
    kind = trainer.accelerator.distributed_type
    if trainer.args.world_size > 1 and kind.value.startswith("MULTI_") and trainer.model_wrapped is trainer.model:
        raise RuntimeError(
            f"{trainer.args.world_size} processes train without exchanging gradients, since trainer.evaluate() ran before "
            "trainer.train() (transformers then skips DistributedDataParallel). Evaluate with another Trainer, or after "
            "training."
        )


def _refuse_unknown_scaling(trainer: Trainer, process_group: dist.ProcessGroup | None) -> None:
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = {kind: getattr(parallelism, f"{kind}_size", 1) for kind in ("tp", "cp", "sp")}
    split = [f"{kind}_size={size}" for kind, size in sizes.items() if size and size > 1]
    if split and process_group is None:
        raise ValueError(
            f"{', '.join(split)}: some ranks share tokens or gradients, so the data-parallel ranks cannot be told from "
            "the world size. Pass them: phb.attach(trainer, process_group=...)."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"this process drives {trainer.args.n_gpu} GPUs by torch.nn.DataParallel, whose threads would count into the "
            "same statistics. Launch one process per GPU (accelerate launch, torchrun), or set CUDA_VISIBLE_DEVICES."
        )
    if trainer.is_deepspeed_enabled and trainer.args.fp16:
        raise ValueError(
            "DeepSpeed keeps its fp16 loss scale to itself, so the strength of the price gradient would be unknown. "
            "Train with bf16=True."
        )
