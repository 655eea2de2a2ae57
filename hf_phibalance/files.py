"""Helpers for files, names and text, without models. Every subpackage may import them."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import io
import json
import os
import re
import reprlib
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


# File beside a model's weights, with means and biases. Engines load every *.safetensors, *.bin, *.pt, *.pth, *.gguf
# and *.npz in a folder as weights, so it has none of these endings.
STATE_NAME = "phi_balance.state"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
PACKAGES_SHOWN = ("hf_phibalance", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
SMALL = 2**20  # bytes; configs are smaller
LARGE = 2**30  # bytes; logs of runs are smaller
QUOTED = 200  # longest quote of a user's value in a message, in characters


# ---------------------------------------------------------------------- find


def find_file(source: str | os.PathLike, name: str, kwargs: Mapping[str, Any]) -> str | None:
    """
    Returns the path of the file `name` in `source`, a folder or a name on the Hub. Returns `None` if it is not there.

    Args:
        source (`str` or `os.PathLike`): Folder or Hub name.
        name (`str`): Name of the file.
        kwargs (`Mapping`): Arguments of `from_pretrained`. Only those for the Hub are used.
    """
    from transformers.utils import cached_file

    quietly = {f"_raise_exceptions_for_{why}": False for why in ("gated_repo", "missing_entries", "connection_errors")}
    return cached_file(source, name, **hub_arguments(kwargs), **quietly)


def find_state(source: str | os.PathLike, kwargs: Mapping[str, Any]) -> str | None:
    """Returns the path of the state beside the weights in `source`; see [`find_file`]."""
    return find_file(source, STATE_NAME, kwargs)


def state_in(folder: str | os.PathLike) -> Path | None:
    """Returns the path of the state in `folder`, or `None`. Does not ask the Hub."""
    path = Path(folder, STATE_NAME)
    return path if path.is_file() else None


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `from_pretrained` that say where a file is on the Hub."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


# ---------------------------------------------------------------------- read


def read_json(path: str | os.PathLike, remedy: str, limit: int = SMALL) -> dict[str, Any]:
    """
    Reads a file with a JSON object.

    Args:
        path (`str` or `os.PathLike`): The file, or a link to it.
        remedy (`str`): Sentence for the error message that says how to fix the file.
        limit (`int`, *optional*, defaults to `SMALL`): Largest size in bytes.

    Raises:
        ValueError: If it is not a JSON object, too large, or a pipe or a device.
        OSError: If it is missing or cannot be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file. {remedy}")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, too many for such a file. {remedy}")
    try:
        values = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}. {remedy}")
    return values


def parse_json(content: str | bytes) -> Any:
    """
    Parses JSON, including NaN and Infinity.

    Raises:
        ValueError: If it is not valid JSON in UTF-8, nests too deeply, repeats a key (other readers silently take one
            of them), or has a number with thousands of digits or half a surrogate pair (which cannot be written).
    """
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    try:
        values = json.loads(text, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(values, ensure_ascii=False).encode()  # raises if a surrogate has no partner
    return values


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(twice)} is given twice")
    return values


# ---------------------------------------------------------------------- write


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Context manager that replaces the file `path` atomically. Yields a temporary path to write to.

    `path` is always the complete old or the complete new file. After the block, the new file survives a power failure.
    """
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)  # it may be a link: do not write to its target
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    try:
        # Windows syncs only files that are open for writing
        descriptor = os.open(path, os.O_RDWR if path.is_file() and os.access(path, os.W_OK) else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some file systems cannot sync folders, and do not need to
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP)):
            raise


def flush_tree(folder: Path) -> None:
    """Waits until `folder` and everything in it are on disk. Other processes may delete files in the meantime."""
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent, name) for name in files), Path(parent)):
            with contextlib.suppress(FileNotFoundError):
                flush(path)
    if folder.is_dir():
        flush(folder.parent)


# ---------------------------------------------------------------------- show

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = QUOTED


def quoted(value: Any) -> str:
    """Returns `repr(value)` as one line of at most 200 characters, for messages."""
    text = printable(_repr.repr(value))
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def printable(text: str) -> str:
    """Returns `text` as one line of Unicode. Control characters and bytes of other encodings become escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def replace_unprintable() -> None:
    """Makes stdout and stderr replace characters that their encoding lacks (φ in Windows code page 1252)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook
            stream.reconfigure(errors="replace")


def layer_labels(names: Sequence[str]) -> list[str]:
    """Returns `layer 3` for `model.layers.3.mlp.gate`. A name without exactly one number, or with the label of another, stays whole."""
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in names]
    short = [f"layer {own[0]}" if len(own) == 1 else name for name, own in zip(names, numbers)]
    seen = Counter(short)
    return [name if seen[label] > 1 else label for name, label in zip(names, short)]


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that a result depends on."""
    found = {}
    for name in PACKAGES_SHOWN:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def without_paths(words: Sequence[str]) -> str:
    """Returns the command line of `words`. Cuts absolute paths, also in `name=path`, to their last part, because they are private."""

    def last(path: str) -> str:
        return Path(path).name if Path(path).is_absolute() else path

    parts = (last(word).partition("=") for word in words)
    return shlex.join(f"{name}{equals}{last(value)}" for name, equals, value in parts)


def hub_name(name: str | None) -> str | None:
    """Returns `name` if it can be a repository on the Hub, and `None` for a folder on this or another machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and "/" in name and not Path(name).exists() else None


def public_name(name: str) -> str:
    """Returns the Hub name of a model or dataset, or the last part of a folder's path (the rest is private)."""
    return hub_name(name) or re.split(r"[/\\]", name.rstrip("/\\"))[-1]
