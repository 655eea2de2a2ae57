"""Files, names and text: what every room needs of the system, and nothing of models."""

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


# The file with means and biases beside a model's weights. Engines take all *.safetensors (or *.bin, *.pt, *.pth, *.gguf, *.npz)
# of a folder for weights: this name matches none of them.
STATE_NAME = "phi_balance.state"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
SMALL = 2**20  # bytes, more than any configuration has
LARGE = 2**30  # bytes, more than the log of any run has
QUOTED = 200  # characters of a foreign value in a message
LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # perhaps: half a character, which cannot be written again

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = QUOTED
NOT_FOR_FOLDERS = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP}
PACKAGES_SHOWN = ("hf_phibalance", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def state_in(folder: str | os.PathLike) -> Path | None:
    """The state beside the weights in `folder`, if there is one; nothing is read, and the Hub is not asked."""
    path = Path(folder, STATE_NAME)
    return path if path.is_file() else None


def find_state(source: str | os.PathLike, kwargs: Mapping[str, Any]) -> str | None:
    """Returns the path of the state beside the weights in `source`, a folder or a name on the Hub; see [`find_file`]."""
    return find_file(source, STATE_NAME, kwargs)


def find_file(source: str | os.PathLike, name: str, kwargs: Mapping[str, Any]) -> str | None:
    """
    Returns the path of a file in `source`, a folder or a name on the Hub; `None` if it is not there.

    Args:
        source (`str` or `os.PathLike`): the folder or name.
        name (`str`): of the file.
        kwargs (`Mapping`): arguments of `from_pretrained`, of which those for the Hub are taken.
    """
    from transformers.utils import cached_file

    quietly = {f"_raise_exceptions_for_{why}": False for why in ("gated_repo", "missing_entries", "connection_errors")}
    return cached_file(source, name, **hub_arguments(kwargs), **quietly)


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those arguments of `from_pretrained` that say where on the Hub something is."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Yields where to write what `path` is to hold. Whatever happens meanwhile, under that name is the whole new file or
    the one that was there before, and after the block it is the new one, also if the power fails.
    """
    partial = path.with_suffix(".partial")
    # a link to something else, in a folder from somewhere else, is not written through
    partial.unlink(missing_ok=True)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    try:
        # Windows syncs a file only if it may be written to
        descriptor = os.open(path, os.O_RDWR if path.is_file() and os.access(path, os.W_OK) else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some file systems keep folders without being told, and refuse to be told
        if not (path.is_dir() and error.errno in NOT_FOR_FOLDERS):
            raise


def flush_tree(folder: Path) -> None:
    """Waits until everything in `folder`, and its own name, have reached the disk; others may be at work in it."""
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent, name) for name in files), Path(parent)):
            with contextlib.suppress(FileNotFoundError):
                flush(path)
    if folder.is_dir():
        flush(folder.parent)


def replace_unprintable() -> None:
    """Makes stdout and stderr replace what their encoding lacks (code page 1252 of Windows has no φ) instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has streams of its own
            stream.reconfigure(errors="replace")


def short_layer(layer: str) -> str:
    """`model.layers.3.mlp.gate` as `layer 3`, and other names as they are."""
    parts = layer.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else layer


def layer_labels(names: Sequence[str]) -> list[str]:
    """Short names of layers, `layer 3`, as far as they stay apart."""
    short = [short_layer(name) for name in names]
    seen = Counter(short)
    return [name if seen[label] > 1 else label for name, label in zip(names, short)]


def versions() -> dict[str, str]:
    """Versions of the installed packages that a result depends on."""
    found = {}
    for name in PACKAGES_SHOWN:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def without_paths(command: Any) -> str | None:
    """A command line with absolute paths cut to their last part: where files lie on one machine helps nobody else."""
    if not command:
        return None
    if isinstance(command, Sequence) and not isinstance(command, str):
        words = [str(word) for word in command]
    else:
        try:
            words = shlex.split(str(command))
        except ValueError:
            return str(command)
    return shlex.join(Path(word).name if is_absolute(word) else word for word in words)


def hub_name(name: str | None) -> str | None:
    """Returns `name` if it can be a repository on the Hub, and `None` for a folder, here or on another machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and "/" in name and not Path(name).exists() else None


def public_name(name: str) -> str:
    """Returns the name of a model or dataset; of a folder the last part, since the path is private."""
    return hub_name(name) or re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def is_absolute(value: Any) -> bool:
    """Whether `value` is an absolute path, as text."""
    return isinstance(value, str) and Path(value).is_absolute()
