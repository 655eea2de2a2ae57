"""Rows as they lie in files or on the Hub, unchecked, each with its place: a file and a line, or a number."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from .table import MBPP_SPLITS, Row, Task


def is_hub(source: str) -> bool:
    """Whether `source` names a dataset on the Hub; raises if it looks like a path that does not exist."""
    if Path(source).exists():
        return False
    name = source.partition(":")[0]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or re.search(r"\.(jsonl|gz|json)$", name):
        raise FileNotFoundError(f"{source!r} does not exist: give a folder, a .jsonl file or a dataset on the Hub.")
    return True


def _local_file(task: Task, source: str, split: str) -> Path:
    path = Path(source)
    if not path.is_dir():
        return path
    names = [f"{split}.jsonl", f"{split}.jsonl.gz", *task.files]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"{source!r} holds none of {', '.join(names)}: give a folder that does, or the file itself."
    )


def read_rows(task: Task, source: str, split: str) -> Iterator[tuple[str, Row | str]]:
    """`(place, row)` of all rows, or `(place, what is wrong)`; the place is a file with its line, or a number."""
    if is_hub(source):
        yield from read_hub(task, source, split)
    else:
        yield from read_lines(_local_file(task, source, split))


def read_hub(task: Task, source: str, split: str) -> Iterator[tuple[str, Row | str]]:
    from datasets import load_dataset

    name, _, own_config = source.partition(":")
    config = own_config or (task.hub_config if name == task.hub_name else None)
    parts = "+".join(part for part in MBPP_SPLITS if part != "all") if split == "all" else split
    try:
        table = load_dataset(name, config, split=parts)
    except Exception as error:
        raise ValueError(
            f"{source!r} is no local file or folder, and split {split!r} of it could not be loaded from the Hub "
            f"({type(error).__name__}: {error}). Correct the name, or give a path."
        ) from error
    for number, row in enumerate(table):
        yield f"row {number}", dict(row)


def read_lines(path: Path) -> Iterator[tuple[str, Row | str]]:
    """Reads JSON lines one by one, so that whatever is wrong has a line number."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8
                    yield f"{path.name}, line {number}", f"it is not JSON: {error}"
                    continue
                yield f"{path.name}, line {number}", row if isinstance(row, dict) else "it is not a JSON object"
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read beyond line {number}: {error}. Get the file anew.") from error
