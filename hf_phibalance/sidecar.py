"""
The file that keeps means and biases beside a model's weights: what it is called, and how it is found.

Engines take all `*.safetensors` of a folder for weights, or all `*.bin`, `*.pt`, `*.pth`, `*.gguf`, `*.npz`: the name matches
none of these. Earlier versions wrote the same content under another name, which is still read, where the new one is not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar


STATE_NAME = "phi_balance.state"
EARLIER_STATE_NAME = "phi_balance.safetensors"  # which they would take
Found = TypeVar("Found")


def first_state(fetch: Callable[[str], Found | None]) -> Found | None:
    """What `fetch` returns for the name of a state, or else for its name in earlier versions."""
    found = fetch(STATE_NAME)
    return fetch(EARLIER_STATE_NAME) if found is None else found


def state_in(folder: str | os.PathLike) -> Path | None:
    """The state beside the weights in `folder`, if there is one; nothing is read, and the Hub is not asked."""

    def look(name: str) -> Path | None:
        path = Path(folder, name)
        return path if path.is_file() else None

    return first_state(look)
