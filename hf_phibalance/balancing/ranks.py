"""The data-parallel ranks that share an optimizer step."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks over which statistics are summed and gradients averaged: all, or those of `group`."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def sum_(self, values: Tensor) -> None:
        """Adds up `values` over the ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values, group=self.group)

    def __getstate__(self) -> dict[str, Any]:
        return {"group": None}  # it belongs to this process
