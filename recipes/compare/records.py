"""The results file: one JSON line for each finished run, appended as a whole, read back without trust."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_phibalance.files import parse_json

from .run import key_of


class Results:
    """
    Finished runs by their settings.

    A line that was cut short, because the machine went down while it was written, is left out with a warning and its run
    is done again; what is appended after it starts on a line of its own. Several processes may append to one file.

    Args:
        path (`str` or `os.PathLike`): `results.jsonl`; need not exist yet.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._records: dict[str, dict[str, dict[str, Any]]] = {}
        if self.path.is_file():
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        self._keep(parse_json(line))
                    except (ValueError, KeyError, TypeError, AttributeError):
                        warnings.warn(f"{self.path}, line {number} is no result; its run is done again.", stacklevel=2)

    def __contains__(self, run: Any) -> bool:
        return run.corpus in self._records.get(run.key, {})

    def __len__(self) -> int:
        return sum(len(by_corpus) for by_corpus in self._records.values())

    def get(self, run: Any) -> dict[str, Any] | None:
        """The result of `run`, on its text; on the text of the latest result if the run does not say which."""
        by_corpus = self._records.get(run.key, {})
        if run.corpus:
            return by_corpus.get(run.corpus)
        return next(reversed(by_corpus.values()), None)

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends a result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(dict(record), sort_keys=True)
        with open(self.path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._keep(record)

    def _keep(self, record: Mapping[str, Any]) -> None:
        settings, metrics = record["settings"], record["metrics"]
        key, corpus = key_of(settings), settings["corpus"]
        if not isinstance(corpus, str) or not all(map(_is_figure, metrics.values())):
            raise TypeError("a result has the name of its text, and figures")
        by_corpus = self._records.setdefault(key, {})
        by_corpus.pop(corpus, None)  # the latest comes last
        by_corpus[corpus] = dict(record)


def _is_figure(value: Any) -> bool:
    """Whether `value` is a number that can be reckoned with; not a number, and infinity, are what a run may come to."""
    if isinstance(value, float):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
