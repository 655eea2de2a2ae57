"""Completes the uploads of `Trainer(push_to_hub=True)`: the state, and a card that says how the model was balanced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers import TrainerCallback

from ..balancing import find_balancer
from .card import CARD_MARK, CARD_NAME, balance_section, tags
from .run import Run


if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


class _UploadCallback(TrainerCallback):
    """Writes the state where `Trainer` uploads from. Of a checkpoint, `Trainer` copies only the files that it knows."""

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        balancer = find_balancer(model)
        if balancer is not None and state.is_world_process_zero:
            balancer.save(str(args.output_dir))


def complete_uploads(trainer: Trainer, history: list[dict[str, Any]] | None = None) -> Callable[[], None]:
    """
    Lets `Trainer(push_to_hub=True)` and `trainer.push_to_hub()` upload the state too, and adds a section about expert
    balance to their card. A card that [`push_to_hub`] or a recipe wrote is kept. [`attach`] calls this function; a second
    call does nothing.

    Args:
        trainer (`transformers.Trainer`): The trainer.
        history (`list[dict]`, *optional*): The `history` of the [`PhiBalanceCallback`].

    Returns:
        `Callable`: undoes the call.
    """
    if any(isinstance(callback, _UploadCallback) for callback in trainer.callback_handler.callbacks):
        return lambda: None
    uploads = _UploadCallback()
    trainer.add_callback(uploads)
    create: Any = trainer.create_model_card
    own = vars(trainer).get("create_model_card")

    @functools.wraps(create)
    def create_with_balance(*args, **kwargs):
        path = Path(str(trainer.args.output_dir), CARD_NAME)
        is_writer = trainer.is_world_process_zero()
        before = path.read_text(encoding="utf-8", errors="replace") if is_writer and path.is_file() else ""
        create(*args, **kwargs)
        balancer = find_balancer(trainer.model)  # type: ignore[arg-type]
        if not is_writer or balancer is None or not path.is_file():
            return
        if CARD_MARK in before:
            path.write_text(before, encoding="utf-8")
            return
        run = Run.of(trainer, balancer.config, history or [])
        card = ModelCard.load(path, ignore_metadata_errors=True)
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags(run)]))
        card.text = f"{card.text.rstrip()}\n\n{balance_section(run)}"
        card.save(path)

    def undo() -> None:
        trainer.remove_callback(uploads)
        if vars(trainer).get("create_model_card") is create_with_balance:
            vars(trainer).pop("create_model_card")
            vars(trainer).update({} if own is None else {"create_model_card": own})

    trainer.create_model_card = create_with_balance  # type: ignore[method-assign]
    return undo
