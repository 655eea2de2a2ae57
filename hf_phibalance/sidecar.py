"""
The file that keeps means and biases beside a model's weights: what it is called, and how it is found.

Engines take all `*.safetensors` of a folder for weights, or all `*.bin`, `*.pt`, `*.pth`, `*.gguf`, `*.npz`: the name matches
none of these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


STATE_NAME = "phi_balance.state"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


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
