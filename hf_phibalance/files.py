"""Reads JSON that may be damaged, foreign or hostile, and quotes what others wrote in messages."""

from __future__ import annotations

import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any


SMALL = 2**20  # bytes, more than any configuration has
LARGE = 2**30  # bytes, more than the log of any run has
QUOTED = 200  # characters of a foreign value in a message
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # perhaps: half a character, which cannot be written again

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = QUOTED


def quoted(value: Any) -> str:
    """Returns `repr(value)`, cut to 200 characters: what others wrote must not flood a message, nor end its line."""
    text = printable(_repr.repr(value))
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def printable(text: str) -> str:
    """Returns `text` as one line of Unicode: control characters and bytes of other encodings are written as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def parse_json(content: str | bytes) -> Any:
    """
    Parses JSON, NaN and Infinity included.

    Raises:
        ValueError: if it is none, whatever is wrong: no UTF-8, cut off, nested beyond measure, a key given twice (of which
            other readers would take one, silently), a number of thousands of digits, half a character.
    """
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    try:
        values = json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if LONE_SURROGATE.search(text):
        json.dumps(values, ensure_ascii=False).encode()
    return values


def read_json(path: str | os.PathLike, remedy: str, limit: int = SMALL) -> dict[str, Any]:
    """
    Reads a file that has to hold a JSON object.

    Args:
        path (`str` or `os.PathLike`): the file; a link to one is followed.
        remedy (`str`): what to do if it cannot be used, as a sentence.
        limit (`int`, *optional*): bytes, beyond which it is not read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no JSON object, is too large, or is no file but a pipe or a device, which has no end.
        OSError: if it cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file. {remedy}")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, too many for what it should hold. {remedy}")
    try:
        values = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}. {remedy}")
    return values


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise ValueError(f"the key {quoted(twice)} is given twice")
    return values
