"""`watch`: follows the routers of a Trainer or of a model in a loop of one's own, without changing the training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..balancing import find_balancer, find_balancers, on_train, patch, unpatch
from ..files import quoted
from ..watching import Thresholds, Watch
from .attaching import attach
from .callback import find_callback


def watch(
    subject: Trainer | nn.Module,
    output_dir: str | os.PathLike | None = None,
    *,
    on_alert: str = "log",
    thresholds: Thresholds | None = None,
) -> Watch:
    """
    Watches the routers in training, and changes nothing: weights, losses, checkpoints and `config.json` are those of a run
    that is not watched. An auxiliary loss of the model or the trainer stays on. A model that is balanced stays balanced.

    Loads and other figures go to the log (`moe/...`), to `moe.jsonl` in `output_dir`, and to the trackers that run. What goes wrong
    is said once, with a reason and a remedy, in the log and in the trackers' alerts. Watching a model again stops its former watch.

    Args:
        subject (`transformers.Trainer` or `torch.nn.Module`):
            A trainer, before `train()`; or the model of a loop of your own, which calls [`~watching.Watch.log`].
        output_dir (`str` or `os.PathLike`, *optional*): where `moe.jsonl` is written. Defaults to that of the trainer; without a trainer,
            nothing is written by default.
        on_alert (`str`, *optional*, defaults to `"log"`): `"raise"` stops the training with a [`RouterAlert`].
        thresholds (`watching.Thresholds`, *optional*): when an alert begins.

    Returns:
        `Watch`: its `stop()` undoes everything, but leaves a model balanced that you have balanced meanwhile.

    Raises:
        ValueError: if the model has no routers that can be watched, or if `train()` will make another one.
    """
    if not isinstance(subject, Trainer | nn.Module):
        raise TypeError(f"`subject` must be a Trainer or a torch.nn.Module, got {quoted(subject)}.")
    if on_alert not in ("log", "raise"):
        raise ValueError(f"`on_alert` must be 'log' or 'raise', got {quoted(on_alert)}.")
    if not isinstance(thresholds, Thresholds | None):
        raise TypeError(f"`thresholds` must be a watching.Thresholds, got {quoted(thresholds)}.")
    trainer = subject if isinstance(subject, Trainer) else None
    model: Any = subject if trainer is None else trainer.model
    balancer = find_balancer(model)
    if balancer is not None and balancer.watcher is not None:
        balancer.watcher.__self__.stop()  # type: ignore[attr-defined]
        balancer = find_balancer(model)
    was_patched = balancer is not None
    if not was_patched and trainer is not None and trainer.model_init is not None:
        raise ValueError(
            "train() will call `model_init`, and the model that it returns would not be watched. Let `model_init` return "
            "phb.patch(model, {'method': 'none'})."
        )
    if not was_patched:
        patch(model, {"method": "none"})
    if trainer is not None and output_dir is None:
        output_dir = trainer.args.output_dir
    found = Watch(model, output_dir, on_alert, thresholds)
    if not was_patched:
        found.on_stop.append(lambda: _unless_balanced(model, lambda: unpatch(model)))
    if trainer is not None:
        callback = find_callback(trainer)
        if callback is None or callback.detach is None:
            detach: Any = attach(trainer).detach
            found.on_stop.append(lambda: _unless_balanced(model, detach))
        follower, handler = _WatchCallback(trainer, found), trainer.callback_handler
        trainer.add_callback(follower)
        found.on_stop.append(lambda: trainer.remove_callback(follower))
        # a callback may call stop(): removing from a copy of the list skips none of the others
        found.on_stop.append(lambda: setattr(handler, "callbacks", list(handler.callbacks)))
        found.in_trainer = True
    return found


def _unless_balanced(model: nn.Module, undo: Callable[[], Any]) -> None:
    """Calls `undo`, unless the user has balanced the model since [`watch`]."""
    balancer = find_balancer(model)
    if balancer is None or not balancer.config.is_on:
        undo()


def _refuse_watch_of_a_loop(trainer: Any) -> None:
    """Raises if a Trainer begins whose model is watched as in a loop of one's own: nothing would be written."""
    found = [] if trainer.model is None else find_balancers(trainer.model)
    if any(balancer.watcher is not None and not balancer.watcher.__self__.in_trainer for balancer in found):  # type: ignore[attr-defined]
        raise RuntimeError(
            "phb.watch(model) is for a loop of your own, so this Trainer would write nothing to moe.jsonl. Call phb.watch(trainer)."
        )


on_train.insert(0, _refuse_watch_of_a_loop)


class _WatchCallback(TrainerCallback):
    """Tells a [`Watch`] when a Trainer begins, which steps it will log, and what it logs."""

    def __init__(self, trainer: Any, watch: Watch) -> None:
        self.watch, self.trainer = watch, trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.watch.follow(model)
        self.watch.begin(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.watch.is_stopped:
            return
        if not self.watch.follows(model):  # patched anew
            self.watch.follow(model)
            self.watch.begin(state.global_step)
        self.watch.balancer.measures_confidence = _will_be_logged(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            writers = (getattr(callback, "tb_writer", None) for callback in self.trainer.callback_handler.callbacks)
            writer = next((writer for writer in writers if writer is not None), None)
            self.watch.record(state.global_step, logs["loss"], writer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the steps since the last log, of which a short run, or one without logs, has nothing else."""
        self.watch.record(state.global_step, reads_weights=not args.load_best_model_at_end)


def _will_be_logged(args: Any, state: Any) -> bool:
    """Whether the optimizer step that begins will be logged, or is the last."""
    step, every = state.global_step + 1, state.logging_steps
    if args.logging_strategy == IntervalStrategy.EPOCH:
        every = state.max_steps / max(state.num_train_epochs, 1)
    elif args.logging_strategy == IntervalStrategy.NO:
        every = state.max_steps
    return step % max(round(every), 1) == 0 or step == state.max_steps or (step == 1 and args.logging_first_step)
