"""Wiring φ-balancing into a trainer: exact token counts, metrics in every reporter, what is off meanwhile or refused."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch.distributed as dist
from transformers import Trainer
from transformers.utils import logging

from ..balancing import PhiBalancer, announce_switched_off, find_patch, get_balancer, patch
from ..checkup import DoctorReport
from ..compat import stop_if_done
from ..publishing import complete_uploads
from .calibrating import CalibrateFirst, calibrated_batches
from .callback import PhiBalanceCallback
from .checkpoints import keep_whole
from .examining import verify_first_step
from .generated import announce_when_generated, generates
from .refusals import refuse_ranks_apart, refuse_unknown_scaling


logger = logging.get_logger(__name__)


def attach(
    trainer: Trainer,
    process_group: dist.ProcessGroup | None = None,
    verify: bool = False,
    calibrate: int = 0,
) -> PhiBalanceCallback:
    """
    Wires φ-balancing into `trainer`, whose model must be patched: duals, exact token counts, metrics in every reporter
    and in `log_history`, loads of evaluations, state in checkpoints. A run that was killed, at whatever moment, resumes
    from its newest complete checkpoint. Works with any subclass of `Trainer`; calling it again returns the same callback.

    Args:
        trainer (`transformers.Trainer`): the trainer, before `train()`.
        process_group (`torch.distributed.ProcessGroup`, *optional*):
            The data-parallel ranks, if they are not simply all ranks (tensor, context or sequence parallelism).
        verify (`bool`, *optional*, defaults to `False`):
            Whether `train()` begins by trying out its first step, as [`doctor`] does: training then ends before it has begun
            if anything is wrong, and else goes on as if nothing had been. The report is logged, and kept in `callback.report`.
        calibrate (`int`, *optional*, defaults to `0`):
            `train()` begins by setting the means to those of so many of its first batches (`True`: 8), as [`calibrate`] does,
            where they would be uniform; for routers that are trained already. The training then sees the same batches in the
            same order. Left out where there are duals to go on from.

    Returns:
        `PhiBalanceCallback`: the callback in use; its `history` holds the loads at each logging step.

    Raises:
        ValueError: if the model is not patched, or the way of training cannot keep the promise of an exact coefficient; with
            `verify`, `train()` raises it with the problems and their remedies.
    """
    callback = next((c for c in trainer.callback_handler.callbacks if isinstance(c, PhiBalanceCallback)), None)
    if callback is not None and callback.attached:
        return callback
    model: Any = trainer.model
    is_on = get_balancer(model).config.is_on
    refuse_unknown_scaling(trainer, process_group)
    if callback is None:
        callback = PhiBalanceCallback()
        trainer.add_callback(callback)
    callback.attached, callback.verifies = True, verify
    if calibrate:
        trainer.add_callback(CalibrateFirst(trainer, calibrated_batches(trainer, calibrate)))
    if is_on:
        _switch_off_trainer_loss(trainer)
    patch(model)

    get_batch_samples, log, evaluate = trainer.get_batch_samples, trainer.log, trainer.evaluate
    load_optimizer: Any = trainer._load_optimizer_and_scheduler
    is_generated = generates(trainer)

    def current() -> PhiBalancer | None:
        """The balancer of the model as it is now: patched again with another configuration, or not any more."""
        present = find_patch(cast(Any, trainer.model))
        if present is None:
            return None
        present.balancer.process_group = process_group
        return present.balancer

    @functools.wraps(get_batch_samples)
    def counted_batch_samples(*args, **kwargs):
        if stop_if_done(trainer):
            return [], None
        batches, items = get_batch_samples(*args, **kwargs)
        if process_group is None:  # else ranks may share a model that nothing wraps
            refuse_ranks_apart(trainer)
        balancer = current()
        if batches and balancer is not None:
            micro_batches = len(batches) if is_generated else _model_inputs(batches)
            balancer.begin_step(micro_batches, loss_scale=callback.loss_scale)
            if callback.verifies and callback.report is None:
                callback.report = verify_first_step(trainer, callback, batches, items)
                _act_on(callback.report, balancer, trainer.is_world_process_zero())
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
    if is_generated:
        announce_when_generated(trainer, current, lambda: callback.loss_scale)
    keep_whole(trainer, callback, current)
    complete_uploads(trainer, callback.history)
    return callback


def _act_on(report: DoctorReport, balancer: PhiBalancer, says: bool) -> None:
    """Ends a training that has a problem, on all ranks alike; else one of them says what was found."""
    if report.problems:
        balancer.discard_step()
        raise ValueError(f"verify=True found what makes this training go wrong. {report}")
    if says:
        (logger.info if report.status == "ok" else logger.warning)(str(report))


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
