"""Figures of a command as JSON: to a file, or to the standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def check_file(option: str, path: str | None) -> None:
    """Refuses a folder where `option` wants a file, before anything is done."""
    if path and path != "-" and Path(path).is_dir():
        raise ValueError(f"`--{option}` {path!r} is a folder: name a file.")


def write_json(figures: dict[str, Any], path: str | None) -> None:
    """Writes `figures` to `path`, to the standard output if that is `-`, and not at all if there is none."""
    if not path:
        return
    text = json.dumps(figures, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
