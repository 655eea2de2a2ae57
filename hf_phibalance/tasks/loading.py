"""Rows of a task, from JSON lines or from the Hub: checked line by line, with the test problems left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from transformers.utils import logging

from .contamination import Fingerprints, shipped_fingerprints
from .reading import is_hub, read_hub, read_lines, read_rows
from .table import Row, Task, get_task


logger = logging.get_logger(__name__)
SHOWN_BAD_ROWS = 5


def load_rows(
    task: str,
    source: str,
    split: str = "train",
    *,
    bad_rows: Literal["refuse", "skip"] = "refuse",
    limit: int | None = None,
) -> list[Row]:
    """
    Loads and checks the rows of a dataset.

    Rows that hold a test problem of GSM8K or HumanEval are left out, with one warning, except from GSM8K's and
    HumanEval's own `test`; see `contamination.py` for what is recognised.

    Args:
        task (`str`): one of `TASKS`.
        source (`str`):
            A folder with `<split>.jsonl` (or `.jsonl.gz`) or the file that the dataset is published as (`mbpp.jsonl`,
            `HumanEval.jsonl.gz`); one `.jsonl` or `.jsonl.gz` file; or a dataset on the Hub, `name` or `name:config`.
            A file of MBPP is divided by `task_id`; any other single file is the split, whatever it is called.
        split (`str`, *optional*, defaults to `"train"`):
            MBPP's are `"test"` (`task_id` 11 to 510), `"validation"` (511 to 600), `"train"` (601 to 974), `"prompt"`
            (1 to 10), and `"all"`, which is what to train on when another benchmark (HumanEval) does the examining.
        bad_rows (`"refuse"` or `"skip"`, *optional*, defaults to `"refuse"`):
            What to do if a row is malformed: raise, or leave it out with one warning that counts and shows them.
        limit (`int`, *optional*): stop after so many good rows; the rest is not looked at.

    Returns:
        `list[dict]`: the rows, as they are in the source.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if an argument is invalid, nothing is left, or a row is malformed and `bad_rows="refuse"`.
    """
    kind = get_task(task)
    if split not in kind.splits:
        hint = " It is for evaluation only, nothing of it may be trained on." if not kind.trains else ""
        raise ValueError(f"split={split!r}: {task} has {', '.join(kind.splits)}.{hint}")
    if bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows={bad_rows!r}: use 'refuse' or 'skip'.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: use a positive number, or None for all rows.")

    guard = None if split == "test" and task in ("gsm8k", "humaneval") else _guard(kind, source)
    rows: list[Row] = []
    bad: list[str] = []
    contaminated: list[str] = []
    seen = 0
    for place, row in read_rows(kind, source, split):
        seen += 1
        if isinstance(row, str):
            bad.append(f"{place}: {row}")
        elif (problem := kind.find_problem(row)) is not None:
            bad.append(f"{place}: {problem}")
        elif kind.ids is not None and not is_hub(source) and row["task_id"] not in kind.ids[split] and split != "all":
            continue
        elif guard is not None and (found := guard.find(row)) is not None:
            contaminated.append(f"{place} ({found})")
        else:
            rows.append(row)
            if len(rows) == limit:
                break

    if bad:
        listed = _listed(bad)
        if bad_rows == "refuse":
            raise ValueError(
                f"{source}: {len(bad)} of {seen} rows cannot be used for {task}:\n{listed}\nCorrect them, or leave them "
                "out with bad_rows='skip'."
            )
        logger.warning(f"{source}: skipped {len(bad)} of {seen} rows that cannot be used for {task}:\n{listed}")
    if contaminated:
        logger.warning(
            f"{source}: left out {len(contaminated)} of {seen} rows that hold a test problem of the named benchmark:\n"
            f"{_listed(contaminated)}"
        )
    if not rows:
        raise ValueError(
            f"{source}: nothing is left of the {seen} rows for split {split!r} of {task}. "
            + ("Is it the right file? MBPP is divided by task_id; split='all' takes every row." if kind.ids else "")
        )
    return rows


def _listed(items: Sequence[str]) -> str:
    more = [f"  ... and {len(items) - SHOWN_BAD_ROWS} more"] if len(items) > SHOWN_BAD_ROWS else []
    return "\n".join([f"  {item}" for item in items[:SHOWN_BAD_ROWS]] + more)


def _guard(task: Task, source: str) -> Fingerprints:
    """The shipped fingerprints, and for GSM8K those of a whole test set that is within reach."""
    shipped = shipped_fingerprints()
    if task.name != "gsm8k":
        return shipped
    guard, problems = shipped.copy(), 0
    for row in _test_rows(task, source):
        if not isinstance(row, str) and task.find_problem(row) is None:
            problems += 1
            for text in task.texts(row):
                guard.add("gsm8k", text)
    return guard if problems else shipped


def _test_rows(task: Task, source: str) -> Iterator[Row | str]:
    """Test problems in the folder of the training rows or, for rows from the Hub, those of the benchmark there."""
    if is_hub(source):
        try:
            yield from (row for _, row in read_hub(task, task.hub_name, "test"))
        except ValueError as error:
            logger.warning(f"Training rows are checked by the shipped fingerprints only: {error}")
        return
    for name in ("test.jsonl", "test.jsonl.gz"):
        if (file := Path(source) / name).is_file():
            yield from (row for _, row in read_lines(file))
            return
