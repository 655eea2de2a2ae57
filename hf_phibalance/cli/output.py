"""Figures of a command as JSON: to a file, or to the standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..files import quoted


def check_file(option: str, path: str | None) -> None:
    """Refuses a file for `option` that cannot be written, before anything is done; makes its folder."""
    if not path or path == "-":
        return
    if Path(path).is_dir():
        raise ValueError(f"`--{option}` {quoted(path)} is a folder: name a file.")
    is_new = not Path(path).exists()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).open("ab").close()
    if is_new:
        Path(path).unlink()


def write_json(figures: dict[str, Any], path: str | None) -> None:
    """Writes `figures` to `path`, to the standard output if that is `-`, and not at all if there is none."""
    if not path:
        return
    text = json.dumps(figures, indent=1, allow_nan=False, ensure_ascii=path == "-") + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        write_text(text, path)


def write_text(text: str, path: str) -> None:
    """Writes a report as UTF-8; what is no Unicode in it, as escapes."""
    Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
