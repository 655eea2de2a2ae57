"""φ-balancing inside a Trainer: when the duals move, where their statistics are logged, what a checkpoint keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..balancing import PhiBalancer, find_patch, get_balancer, patch
from ..checkup import DoctorReport
from ..compat import reload_converted_weights
from ..sidecar import STATE_NAME, state_in
from .refusals import refuse_trained_routers


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
    - the duals of a checkpoint outside `output_dir` on resume, and switching off TRL's auxiliary loss;
    - checkpoints that a kill leaves whole or unmarked. Alone, one that died between the files of `Trainer` and the duals
      is the newest, and resuming from it is refused.

    Args:
        per_layer (`int`, *optional*, defaults to `16`): at most so many layers get metrics of their own.

    Attributes:
        history (`list[dict]`): at each logging step `{"step": int, "load": {layer name: [relative load per expert]}}`,
            1 being a fair share.
        resumed_from (`str`, *optional*): the checkpoint that training came from, if [`attach`] has seen it.
    """

    def __init__(self, per_layer: int = 16) -> None:
        self.per_layer = per_layer
        self.history: list[dict[str, Any]] = []
        self._balancer: PhiBalancer | None = None
        self.attached = False
        self.verifies = False
        self.report: DoctorReport | None = None
        self.resumed_from: str | None = None
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
        refuse_trained_routers(self.balancer)
        self.report = None
        self._scaler = getattr(optimizer, "scaler", None)
        if not self.attached and self.balancer.config.is_on and adds_auxiliary_loss(args, model):
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
        skipped = getattr(optimizer, "step_was_skipped", False)  # fp16 overflow: no step, so no update, on any rank
        self.balancer.step(skipped if skipped or self._scales else None)
        if self._report_after is not None and self.balancer.steps >= self._report_after:
            self._report_learning(state)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs
    ) -> None:
        if not self.attached and "loss" in (logs or {}):
            state.log_history[-1].update(self.training_metrics(state))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.should_save and not self.attached:
            self.balancer.save(_checkpoint_folder(args, state))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._report_after is not None:
            self._report_learning(state)
        best = state.best_model_checkpoint
        if not args.load_best_model_at_end or best is None:
            return
        reload_converted_weights(self.balancer.root, Path(best))
        if state_in(best) is not None:
            self.balancer.load(best)
        else:
            logger.warning(
                f"The best checkpoint {best} has no {STATE_NAME}: its weights get the duals of the last step."
            )

    # ------------------------------------------------------------------ helpers

    @property
    def _scales(self) -> bool:
        """Whether gradients are scaled, so that optimizer steps may be skipped."""
        return self._scaler is not None and self._scaler.is_enabled()

    @property
    def loss_scale(self) -> float | Tensor:
        """Scale of the fp16 `GradScaler` in use, else 1; stays on the device."""
        if self._scaler is None or not self._scales:
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
        """Says once what learns and what balancing can move; aloud unless all of it learns in full, as without an adapter."""
        self._report_after = None
        if state.is_world_process_zero and self.balancer.config.coef > 0:
            report = self.balancer.learning_report()
            say = logger.info if report.all_in_full else logger.warning
            say(str(report))

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        named = self.resumed_from or args.resume_from_checkpoint
        folder = _checkpoint_folder(args, state)
        if isinstance(named, str) and Path(named).is_dir():
            folder = Path(named)
        if state_in(folder) is None:
            raise FileNotFoundError(
                f"training resumes at step {state.global_step}, but there is no {STATE_NAME} in {folder}: the duals "
                "would silently start anew. Resume from a checkpoint written while balancing, or with phb.attach(trainer) "
                "if the checkpoint lies outside output_dir."
            )
        reload_converted_weights(self.balancer.root, folder)
        self.balancer.load(folder)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def adds_auxiliary_loss(args: TrainingArguments, model: Any) -> bool:
    """
    Whether a trainer of TRL adds its own loss. A coefficient of `None` stands for the one in the model's config, which
    `patch` has set to 0 if it came before the trainer, and else has found switched on together with the router logits.
    """
    coef = getattr(args, "router_aux_loss_coef", 0.0)
    present = find_patch(model)
    if coef is None and present is not None:
        return present.undo_built_in.has_changed("output_router_logits")
    return coef != 0.0
