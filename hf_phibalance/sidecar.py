"""
The file that keeps means and biases beside a model's weights: what it is called, and how it is found.

Engines take all `*.safetensors` of a folder for weights, or all `*.bin`, `*.pt`, `*.pth`, `*.gguf`, `*.npz`: the name matches
none of these.
"""

from __future__ import annotations

import os
from pathlib import Path


STATE_NAME = "phi_balance.state"


def state_in(folder: str | os.PathLike) -> Path | None:
    """The state beside the weights in `folder`, if there is one; nothing is read, and the Hub is not asked."""
    path = Path(folder, STATE_NAME)
    return path if path.is_file() else None
