"""The data-parallel ranks that share an optimizer step."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """The ranks over which statistics are summed and gradients averaged: those of `group`, or all."""

    def __init__(self) -> None:
        self.copies = 1  # this many ranks hold the same tokens, which count once
        self.group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """Number of ranks that hold different tokens."""
        return self._world // self._copies

    @property
    def _world(self) -> int:
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def _copies(self) -> int:
        return self.copies if self.group is None and self._world > 1 else 1

    def sum_(self, values: Tensor) -> None:
        """Sums `values` over the ranks, in place. Ranks with the same tokens are summed once."""
        if self._world > 1:
            dist.all_reduce(values, group=self.group)
        if self._copies > 1:
            values.div_(self._copies)

    def sum(self, values: Tensor) -> Tensor:
        """Returns `values` summed over the ranks, and leaves `values` unchanged."""
        if self._world > 1:
            values = values.clone()
            self.sum_(values)
        return values

    def agree(self, text: str, device: torch.device) -> bool:
        """Whether all ranks call this with the same `text`. Waits for `device`."""
        if self._world == 1:
            return True
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        bounds = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.group)
        return bool(bounds[0] == -bounds[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"copies": self.copies, "group": None}  # a group belongs to this process


def count_copies(root: nn.Module) -> int:
    """Returns how many ranks get the same tokens because transformers has split `root` over them."""
    if getattr(root, "_device_mesh", None) is None:
        return 1
    sizes = getattr(getattr(root, "config", None), "distributed_config", None)  # transformers 5.16 has it only there
    return getattr(root, "_tp_size", None) or getattr(sizes, "tp_size", None) or 1
