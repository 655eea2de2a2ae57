"""
Writes checkpoints so that unfinished ones are recognized, and resumes from the newest complete one.

`Trainer` writes a checkpoint file by file under its final name, and resumes from the folder with the largest number, finished or
not. Here `trainer_state.json`, which it writes last, marks a finished checkpoint. It is deleted before anything in the folder is
written again. It is written in one piece after the files of all ranks and the duals have reached the disk. Only then does
`Trainer` delete older checkpoints.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..balancing import PhiBalancer
from ..files import LARGE, flush, flush_tree, read_json, replacing
from .callback import PhiBalanceCallback


logger = logging.get_logger(__name__)
NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    Returns the newest complete checkpoint in `folder`, or `None` if there is none. Skips checkpoints that a killed run left
    unfinished, with a warning; `transformers.trainer_utils.get_last_checkpoint` does not. The newest is the one with the largest
    number, even if an older and longer run wrote it. So start a new run in an empty folder.

    ```python
    phb.attach(trainer)
    trainer.train(resume_from_checkpoint=phb.last_checkpoint(args.output_dir))  # the first start and every restart
    ```

    Args:
        folder (`str` or `os.PathLike`): the `output_dir` of the run; it need not exist.
    """
    numbered = _numbered(Path(folder))
    newest = next(filter(is_complete, numbered), None)
    _warn_of_skipped(numbered, newest)
    return None if newest is None else str(newest)


def is_complete(checkpoint: Path) -> bool:
    """Whether `checkpoint` is finished."""
    return _marked_step(checkpoint) is not None


def _marked_step(checkpoint: Path) -> int | None:
    """Returns the step of a complete checkpoint, else `None`: a plain `Trainer` may have died while it wrote the mark."""
    try:
        return read_json(checkpoint / TRAINER_STATE_NAME, "", LARGE)["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_whole(
    trainer: Any,
    callback: PhiBalanceCallback,
    current: Callable[[], PhiBalancer | None],
    wrap: Callable[[str, Callable], None],
) -> None:
    """
    Makes `trainer` write checkpoints in the order above, and `resume_from_checkpoint=True` take the newest that is complete on
    every rank. `current()` returns the balancer of its present model, `wrap` wraps a method of the trainer.
    """

    def save_whole(save: Callable, model: Any, trial: Any = None) -> Any:
        balancer = current()
        if balancer is None:
            return save(model, trial)
        step = trainer.state.global_step
        folder = Path(trainer._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        came_from = Path(callback.resumed_from or "").resolve()
        if callback.resumed_from and folder.resolve() == came_from and _marked_step(folder) == step:
            return None  # it holds this state already; while it is rewritten there would be no complete one
        return _save_in_order(trainer, balancer, folder, functools.partial(save, model, trial))

    def train_from_complete(train: Callable, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        callback.resumed_from = None
        return train(_complete(trainer, resume_from_checkpoint), *args, **kwargs)

    wrap("_save_checkpoint", save_whole)
    wrap("train", train_from_complete)


def _save_in_order(trainer: Trainer, balancer: PhiBalancer, folder: Path, save: Callable[[], None]) -> None:
    """Removes the mark of `folder`, calls `save` to fill it, adds the duals, and writes the mark."""
    state, writes, mark = trainer.state, trainer.args.should_save, folder / TRAINER_STATE_NAME
    write_state = state.save_to_json
    is_filled = False

    def fill_up() -> None:
        nonlocal is_filled
        is_filled = True
        flush_tree(folder)
        trainer.accelerator.wait_for_everyone()
        if writes:
            balancer.save(folder)

    def mark_filled(json_path: str) -> None:
        fill_up()
        with replacing(Path(json_path)) as partial:
            write_state(str(partial))

    if writes and mark.is_file():
        mark.unlink()
        flush(folder)
    trainer.accelerator.wait_for_everyone()
    state.save_to_json = mark_filled  # type: ignore[method-assign]
    try:
        save()
    finally:
        del state.save_to_json
    if not is_filled:  # a rank that does not write the state
        fill_up()


def _complete(trainer: Trainer, resume: Any) -> Any:
    """Returns the checkpoint of `resume_from_checkpoint=resume`; for `True`, the newest that is complete on every rank."""
    output_dir = Path(str(trainer.args.output_dir))
    if resume is True:
        return _newest_of_all_ranks(trainer, output_dir) or True  # `Trainer` says that there is none
    if isinstance(resume, (str, os.PathLike)) and Path(resume).is_dir() and not is_complete(Path(resume)):
        raise ValueError(
            f"resume_from_checkpoint={str(resume)!r} is not complete: it has no readable {TRAINER_STATE_NAME}, which is "
            "written last. resume_from_checkpoint=True takes the newest complete checkpoint of output_dir, as "
            "phb.last_checkpoint(output_dir) does."
        )
    return resume


def _newest_of_all_ranks(trainer: Trainer, output_dir: Path) -> str | None:
    numbered = _numbered(output_dir)
    found = Counter(gather_object([path.name for path in numbered if is_complete(path)]))
    names = [name for name, ranks in found.items() if ranks == trainer.accelerator.num_processes]
    newest = max((output_dir / name for name in names), key=_number, default=None)
    if trainer.is_world_process_zero():
        _warn_of_skipped(numbered, newest)
    if newest is None and numbered:
        raise ValueError(
            f"{', '.join(path.name for path in numbered)} in {output_dir}: none is complete, the run died while it wrote "
            "them. Start anew, with resume_from_checkpoint=False; they are written again when their steps are reached."
        )
    return None if newest is None else str(newest)


def _warn_of_skipped(numbered: list[Path], newest: Path | None) -> None:
    skipped = [path.name for path in numbered if newest is None or _number(path) > _number(newest)]
    if skipped:
        instead = "There is no complete one." if newest is None else f"The newest complete one is {newest.name}."
        logger.warning(
            f"{', '.join(skipped)} in {numbered[0].parent} passed over: {TRAINER_STATE_NAME}, which is written last, is not "
            f"there or not readable (on every rank), so the run died before it was done. {instead}"
        )


def _numbered(folder: Path) -> list[Path]:
    """Returns the folders of checkpoints in `folder`, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if NUMBERED.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
