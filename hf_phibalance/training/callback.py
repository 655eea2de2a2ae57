"""φ-balancing inside a Trainer: when the duals move, where their statistics are logged, what a checkpoint keeps."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..balancing.balancer import PhiBalancer
from ..balancing.duals import STATE_NAME
from ..balancing.patching import announce_switched_off, find_patch, get_balancer, patch
from ..publishing.upload import complete_uploads
from .compat import reload_converted_weights


logger = logging.get_logger(__name__)


class PhiBalanceCallback(TrainerCallback):
    """
    Updates the duals of a patched model once per optimizer step, and keeps them with every checkpoint.

    Alone (`Trainer(..., callbacks=[PhiBalanceCallback()])`) it works with what callbacks can see. [`attach`] wires a
    callback into the trainer and adds

    - the exact number of tokens of each optimizer step. Alone, each micro-batch is charged its own mean divided by
      `gradient_accumulation_steps`, which is exact only if all micro-batches and ranks hold equally many tokens, and
      no epoch ends with a step of fewer micro-batches;
    - metrics in every reporter. Alone they reach `trainer.state.log_history`, which reporters have read by then;
    - evaluation loads (`eval_moe/...`);
    - the duals of a checkpoint outside `output_dir` on resume, and switching off TRL's auxiliary loss.

    Args:
        per_layer (`int`, *optional*, defaults to `16`): at most so many layers get metrics of their own.

    Attributes:
        history (`list[dict]`): at each logging step `{"step": int, "load": {layer name: [relative load per expert]}}`,
            1 being a fair share.
    """

    def __init__(self, per_layer: int = 16) -> None:
        self.per_layer = per_layer
        self.history: list[dict[str, Any]] = []
        self._balancer: PhiBalancer | None = None
        self.attached = False
        self._resume_from: str | None = None
        self._report_after: int | None = None
        self._scaler = None

    @property
    def balancer(self) -> PhiBalancer:
        """The balancer of the model being trained."""
        if self._balancer is None:
            raise RuntimeError("PhiBalanceCallback knows no model before training begins.")
        return self._balancer

    # ------------------------------------------------------------------ events

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model=None,
        optimizer=None,
        **kwargs,
    ) -> None:
        self._balancer = get_balancer(model)
        patch(model)  # no change to the routers; covers wrappers added since, and losses that a trainer switched on
        self.balancer.discard_step()
        self._scaler = getattr(optimizer, "scaler", None)
        if not self.attached and self.balancer.config.is_on and _adds_auxiliary_loss(args, model):
            coef = getattr(args, "router_aux_loss_coef", None)
            raise ValueError(
                f"router_aux_loss_coef={coef!r} in {type(args).__name__} adds a second auxiliary "
                "loss to φ-balancing. Set router_aux_loss_coef=0.0, or use phb.attach(trainer), which switches it off."
            )
        if state.global_step > 0:
            self._restore(args, state)
        else:
            self.history.clear()
        self._report_after = max(self.balancer.steps + 1, 2)  # the first step has no prices yet

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not self.balancer.is_open:
            self.balancer.begin_step(args.gradient_accumulation_steps, loss_scale=self.loss_scale)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ) -> None:
        if getattr(optimizer, "step_was_skipped", False):  # fp16 overflow: no step, so no update
            self.balancer.discard_step()
        else:
            self.balancer.step()
        if self._report_after is not None and self.balancer.steps >= self._report_after:
            self._report_learning(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        if not self.attached and "loss" in (logs or {}):
            state.log_history[-1].update(self.training_metrics(state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            self.balancer.save(_checkpoint_folder(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._report_after is not None:
            self._report_learning(state)
        best = state.best_model_checkpoint
        if not args.load_best_model_at_end or best is None:
            return
        reload_converted_weights(self.balancer.root, Path(best))
        if (Path(best) / STATE_NAME).is_file():
            self.balancer.load(best)
        else:
            logger.warning(
                f"The best checkpoint {best} has no {STATE_NAME}: its weights get the duals of the last step."
            )

    # ------------------------------------------------------------------ helpers

    @property
    def loss_scale(self) -> float | Tensor:
        """Scale of the fp16 `GradScaler` in use, else 1; stays on the device."""
        if self._scaler is None or not self._scaler.is_enabled():
            return 1.0
        scale = self._scaler._scale  # `get_scale()` would wait for the device
        return self._scaler.get_scale() if scale is None else scale

    def training_metrics(self, state: TrainerState) -> dict[str, float]:
        """Metrics of the last step as `moe/...`; notes the loads in `history`."""
        if self.balancer.steps == 0:
            return {}
        self.balancer.check_finite()
        load = {
            name: (load_E / load_E.mean().clamp(min=1e-30)).tolist() for name, load_E in self.balancer.loads().items()
        }
        if not self.history or self.history[-1]["step"] != state.global_step:
            self.history.append({"step": state.global_step, "load": load})
        return {f"moe/{key}": value for key, value in self.balancer.metrics(self.per_layer).items()}

    def _report_learning(self, state: TrainerState) -> None:
        """Says once what balancing can move; aloud unless all routers learn in full, as they do without an adapter."""
        self._report_after = None
        if state.is_world_process_zero and self.balancer.config.coef > 0:
            report = self.balancer.learning_report()
            say = logger.info if all(row.how == "full" for row in report.rows) else logger.warning
            say(str(report))

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        named = self._resume_from or args.resume_from_checkpoint
        folder = _checkpoint_folder(args, state)
        if isinstance(named, str) and Path(named).is_dir():
            folder = Path(named)
        if not (folder / STATE_NAME).is_file():
            raise FileNotFoundError(
                f"training resumes at step {state.global_step}, but there is no {STATE_NAME} in {folder}: the duals "
                "would silently start anew. Resume from a checkpoint written while balancing, or with phb.attach(trainer) "
                "if the checkpoint lies outside output_dir."
            )
        reload_converted_weights(self.balancer.root, folder)
        self.balancer.load(folder)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def attach(trainer: Trainer, process_group: dist.ProcessGroup | None = None) -> PhiBalanceCallback:
    """
    Wires φ-balancing into `trainer`, whose model must be patched: duals, exact token counts, metrics in every reporter
    and in `log_history`, loads of evaluations, state in checkpoints. Works with any subclass of `Trainer`; calling it
    again returns the same callback.

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
        callback._resume_from = checkpoint
        return load_optimizer(checkpoint, *args, **kwargs)

    wrappers = {
        "get_batch_samples": counted_batch_samples,
        "log": log_with_metrics,
        "evaluate": counted_evaluate,
        "_load_optimizer_and_scheduler": noted_load,
    }
    for name, wrapper in wrappers.items():
        setattr(trainer, name, wrapper)
    complete_uploads(trainer, callback.history)
    return callback


def _switch_off_trainer_loss(trainer: Any) -> None:
    """TRL's trainers add an auxiliary loss of their own to any MoE."""
    if getattr(trainer, "aux_loss_enabled", False):
        announce_switched_off()
        trainer.aux_loss_enabled = False
        trainer.router_aux_loss_coef = 0.0


def _adds_auxiliary_loss(args: TrainingArguments, model: Any) -> bool:
    """
    Whether a trainer of TRL adds its own loss. A coefficient of `None` stands for the one in the model's config, which
    `patch` has set to 0 if it came before the trainer, and else has found switched on together with the router logits.
    """
    coef = getattr(args, "router_aux_loss_coef", 0.0)
    present = find_patch(model)
    if coef is None and present is not None:
        return present.undo_built_in.has_changed("output_router_logits")
    return coef != 0.0


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
