"""The callback of φ-balancing in a Trainer: ends optimizer steps, logs metrics, restores the duals of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..balancing import (
    Figures,
    PhiBalancer,
    describe_router,
    find_balancer,
    get_balancer,
    patch,
    warn_of_rounded_routers,
)
from ..compat import reload_converted_weights
from ..diagnosis import DoctorReport
from ..files import STATE_NAME, state_in
from ..maths import relative_load


logger = logging.get_logger(__name__)
HISTORY = 4_000_000  # numbers kept in `history`, about 100 MB


class PhiBalanceCallback(TrainerCallback):
    """
    Keeps the duals of a patched model with every checkpoint, and logs its balance. `Trainer.train` adds it to any trainer whose
    model is patched; [`attach`] adds it earlier, with options.

    Args:
        per_layer (`int`, *optional*, defaults to `0`): at most this many layers get a MaxVio of their own in the log.

    Attributes:
        history (`list[dict]`): at each logging step `{"step": int, "load": {layer name: [relative load per expert]}}`, over the
            steps since the last one, where 1 is a fair share. In a long run only every second, fourth, ... entry is kept.
        resumed_from (`str`, *optional*): the checkpoint that training resumed from.
        report (`DoctorReport`, *optional*): the report of `attach(verify=True)`.
        detach (`Callable`, *optional*): removes the callback and the wrapped methods from its trainer.
    """

    def __init__(self, per_layer: int = 0) -> None:
        self.per_layer = per_layer
        self.history: list[dict[str, Any]] = []
        self.detach: Callable[[], None] | None = None
        self.verifies = False
        self.fresh_duals = False
        self.report: DoctorReport | None = None
        self.resumed_from: str | None = None
        self._balancer: PhiBalancer | None = None
        self._every = 1  # logging steps per entry of `history`
        self._logged = 0
        self._figures: Figures | None = None  # sum over the steps since the last log
        self._steps = 0  # balancer steps when `_figures` was last updated
        self._reports_learning = False

    @property
    def balancer(self) -> PhiBalancer:
        """The balancer of the model being trained."""
        if self._balancer is None:
            raise RuntimeError("PhiBalanceCallback knows no model before training begins.")
        return self._balancer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._balancer = get_balancer(model)
        patch(model)  # again, for wrappers added since and an auxiliary loss that a trainer has switched on
        self.balancer.discard_step()
        _refuse_trained_routers(self.balancer)
        warn_of_rounded_routers(self.balancer.sites)
        self.report = self._figures = None
        if state.global_step > 0:
            self._restore(args, state)
        else:
            self.history.clear()
            self._every, self._logged = 1, 0
        self._steps, self._reports_learning = self.balancer.duals.begun, True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        balancer = find_balancer(model)  # it may have been patched anew, or unpatched
        if balancer is None:
            return
        if balancer is not self._balancer:
            self._balancer, self._figures, self._steps = balancer, None, 0
        skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
        balancer.step(skipped=skipped)  # for optimizers outside torch; others have already ended the step
        if balancer.duals.begun != self._steps:  # not skipped; the figures stay on the device
            self._steps, figures = balancer.duals.begun, balancer.figures()
            self._figures = figures if self._figures is None else self._figures + figures
        if self._reports_learning and balancer.steps:
            self._report_learning(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint
        if not args.load_best_model_at_end or best is None:
            return
        reload_converted_weights(self.balancer.root, Path(best))
        if state_in(best) is not None:
            self.balancer.load(best)
        elif self.balancer.is_saved:
            logger.warning(
                f"The best checkpoint {best} has no {STATE_NAME}: its weights get the duals of the last step."
            )

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Writes the state into the folder that `Trainer` uploads. `Trainer` copies only known files from checkpoints."""
        balancer = find_balancer(model)
        if balancer is not None and balancer.is_saved and state.is_world_process_zero:
            balancer.save(str(args.output_dir))

    def training_metrics(self, step: int) -> dict[str, float]:
        """Returns the means over the steps since the last log as `moe/...`, and adds the loads to `history`."""
        figures, self._figures = self._figures, None
        if figures is None:
            return {}
        self.balancer.check_finite()
        self._note_loads(step, figures.load_LE)
        return {f"moe/{key}": value for key, value in self.balancer.metrics(self.per_layer, figures).items()}

    def _note_loads(self, step: int, load_LE: Tensor) -> None:
        self._logged += 1
        if (self._logged - 1) % self._every:
            return
        rows = zip(self.balancer.sites, load_LE.cpu())
        loads = {site.name: relative_load(row[: site.num_experts]).tolist() for site, row in rows}
        self.history.append({"step": step, "load": loads})
        if len(self.history) > 2 and len(self.history) * sum(map(len, loads.values())) > HISTORY:
            del self.history[1::2]
            self._every *= 2

    def _report_learning(self, state: Any) -> None:
        """Logs once which routers and experts learn: a warning if some are frozen or adapted, otherwise info."""
        self._reports_learning = False
        if state.is_world_process_zero and self.balancer.config.coef > 0 and self.balancer.virtual_tokens is None:
            report = self.balancer.learning_report()
            say = logger.info if report.all_in_full else logger.warning
            say(str(report))

    def _restore(self, args: Any, state: Any) -> None:
        named = self.resumed_from or args.resume_from_checkpoint
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if isinstance(named, str) and Path(named).is_dir():
            folder = Path(named)
        if state_in(folder) is not None:
            reload_converted_weights(self.balancer.root, folder)
            self.balancer.load(folder)
        elif not self.balancer.is_saved:
            reload_converted_weights(self.balancer.root, folder)
        elif self.fresh_duals:
            logger.warning(
                f"There is no {STATE_NAME} in {folder}: training resumes with fresh duals, as fresh_duals=True asks."
            )
            self.balancer.reset()
        else:
            raise FileNotFoundError(
                f"training resumes at step {state.global_step}, but there is no {STATE_NAME} in {folder}: the duals "
                "would silently start anew. Resume from a checkpoint written while balancing; or begin with fresh duals, by "
                "phb.attach(trainer, fresh_duals=True)."
            )


def find_callback(trainer: Any) -> PhiBalanceCallback | None:
    return next((c for c in trainer.callback_handler.callbacks if isinstance(c, PhiBalanceCallback)), None)


def _refuse_trained_routers(balancer: PhiBalancer) -> None:
    """Raises if routers have adapters under `method="frozen"`, which freezes only their own parameters."""
    if not balancer.config.rules.freezes:
        return
    rows = [describe_router(name, balancer.root) for name in balancer.layer_names]
    trained = [f"{row.name} ({row.how})" for row in rows if row.how != "frozen"]
    if trained:
        raise ValueError(
            f"method={balancer.config.method!r}, but {len(trained)} of {len(rows)} routers are trained: {', '.join(trained[:4])}. "
            "Leave them out of the adapter, e.g. by phb.lora_config(model, router='frozen'), or choose another method."
        )
