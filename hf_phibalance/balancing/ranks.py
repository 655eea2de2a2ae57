"""The data-parallel ranks that share an optimizer step."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks:
    """
    The ranks over which statistics are summed and gradients averaged: all, or those of `group`.

    Args:
        copies (`int`, *optional*, defaults to `1`): so many of all ranks hold the same tokens. They are counted once.
    """

    def __init__(self, copies: int = 1) -> None:
        self.copies = copies
        self.group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """How many ranks hold tokens of their own."""
        return self._world // self._copies

    @property
    def _world(self) -> int:
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def _copies(self) -> int:
        return self.copies if self.group is None and self._world > 1 else 1

    def sum_(self, values: Tensor) -> None:
        """Adds up `values` over the ranks, in place; what ranks hold in common is added once."""
        if self._world > 1:
            dist.all_reduce(values, group=self.group)
        if self._copies > 1:
            values.div_(self._copies)

    def sum(self, values: Tensor) -> Tensor:
        """The same, which leaves `values` as they are."""
        if self._world > 1:
            values = values.clone()
            self.sum_(values)
        return values

    def agree(self, text: str, device: torch.device) -> bool:
        """Whether all ranks have called this with the same `text`; waits for `device`."""
        if self._world == 1:
            return True
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        bounds = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.group)
        return bool(bounds[0] == -bounds[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"copies": self.copies, "group": None}  # a group belongs to this process


def count_copies(root: nn.Module) -> int:
    """How many ranks see the same tokens, since transformers has split the tensors of `root` over them."""
    if getattr(root, "_device_mesh", None) is None:
        return 1
    sizes = getattr(getattr(root, "config", None), "distributed_config", None)  # transformers 5.16 says it only there
    return getattr(root, "_tp_size", None) or getattr(sizes, "tp_size", None) or 1
