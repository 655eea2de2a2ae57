"""
Writes checkpoints so that unfinished ones are recognized, and resumes from the newest complete one.

`Trainer` writes a checkpoint file by file under its final name, and resumes from the folder with the largest number, finished or
not. Here `trainer_state.json`, which it writes last, marks a finished checkpoint. It is deleted before anything in the folder is
written again. It is written in one piece after the files of all ranks and the duals have reached the disk. Only then does
`Trainer` delete older checkpoints.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..balancing import PhiBalancer
from ..files import LARGE, flush, flush_tree, read_json, replacing


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
    newest = _newest(numbered, _complete(numbered))
    return None if newest is None else str(newest)


def marked_step(checkpoint: Path) -> int | None:
    """Returns the step of a complete checkpoint, else `None`: a plain `Trainer` may have died while it wrote the mark."""
    try:
        return read_json(checkpoint / TRAINER_STATE_NAME, "", LARGE)["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def complete_checkpoint(trainer: Any, resume: Any) -> Any:
    """Returns the checkpoint of `resume_from_checkpoint=resume`; for `True`, the newest that is complete on every rank."""
    if resume is True:
        numbered, ranks = _numbered(Path(trainer.args.output_dir)), trainer.accelerator.num_processes
        found = Counter(gather_object(_complete(numbered)))
        names = [name for name, number in found.items() if number == ranks]
        newest = _newest(numbered, names, warns=trainer.is_world_process_zero())
        if newest is None and numbered:
            raise ValueError(
                f"{', '.join(path.name for path in numbered)} in {trainer.args.output_dir}: none is complete, the run died while "
                "it wrote them. Start anew, with resume_from_checkpoint=False; they are written again when their steps are reached."
            )
        return True if newest is None else str(newest)  # with `True`, `Trainer` says that there is none
    if isinstance(resume, (str, os.PathLike)) and Path(resume).is_dir() and marked_step(Path(resume)) is None:
        raise ValueError(
            f"resume_from_checkpoint={str(resume)!r} is not complete: it has no readable {TRAINER_STATE_NAME}, which is "
            "written last. resume_from_checkpoint=True takes the newest complete checkpoint of output_dir, as "
            "phb.last_checkpoint(output_dir) does."
        )
    return resume


def save_in_order(trainer: Any, balancer: PhiBalancer, folder: Path, save: Callable[[], None]) -> None:
    """Removes the mark of `folder`, calls `save` to fill it, adds the duals, and writes the mark."""
    state, writes, mark = trainer.state, trainer.args.should_save, folder / TRAINER_STATE_NAME
    write_state = state.save_to_json
    is_filled = False

    def fill_up() -> None:
        nonlocal is_filled
        is_filled = True
        flush_tree(folder)
        trainer.accelerator.wait_for_everyone()
        if writes and balancer.is_saved:
            balancer.save(folder)

    def mark_filled(json_path: str) -> None:
        fill_up()
        with replacing(Path(json_path)) as partial:
            write_state(str(partial))

    if writes and mark.is_file():
        mark.unlink()
        flush(folder)
    trainer.accelerator.wait_for_everyone()
    state.save_to_json = mark_filled
    try:
        save()
    finally:
        del state.save_to_json
    if not is_filled:  # a rank that does not write the state
        fill_up()


def _numbered(folder: Path) -> list[Path]:
    """Returns the folders of checkpoints in `folder`, newest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = {int(match[1]): path for path in paths if (match := NUMBERED.fullmatch(path.name)) and path.is_dir()}
    return [found[number] for number in sorted(found, reverse=True)]


def _complete(numbered: list[Path]) -> list[str]:
    return [path.name for path in numbered if marked_step(path) is not None]


def _newest(numbered: list[Path], complete: Collection[str], warns: bool = True) -> Path | None:
    """Returns the first of `numbered` that is `complete`, and warns of those before it."""
    newest = next((path for path in numbered if path.name in complete), None)
    skipped = numbered if newest is None else numbered[: numbered.index(newest)]
    if skipped and warns:
        instead = "There is no complete one." if newest is None else f"The newest complete one is {newest.name}."
        logger.warning(
            f"{', '.join(path.name for path in skipped)} in {skipped[0].parent} passed over: {TRAINER_STATE_NAME}, which is "
            f"written last, is not there or not readable (on every rank), so the run died before it was done. {instead}"
        )
    return newest
