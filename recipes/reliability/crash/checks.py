"""Whether two things that a run left are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def difference(left: Any, right: Any, where: str = "") -> str | None:
    """Where two nested values first differ, by a bit; `None` if nowhere."""
    if type(left) is not type(right):
        return f"{where} differs in type"
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return f"{where} differs in names, {sorted(map(str, left.keys() ^ right.keys()))}"
        pairs = [(str(name), left[name], right[name]) for name in left]
    elif isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return f"{where} differs in length"
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(left, right))]
    else:
        if isinstance(left, torch.Tensor):
            equal = left.dtype == right.dtype and torch.equal(left, right)
        else:
            equal = np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right
        return None if equal else f"{where} differs"
    found = (difference(a, b, f"{where}/{name}") for name, a, b in pairs)
    return next((fault for fault in found if fault), None)
