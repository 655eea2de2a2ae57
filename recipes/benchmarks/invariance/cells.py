"""The matrix: every way to carry out one optimizer step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass


TRAINERS = ("Trainer", "SFTTrainer", "raw loop")
CHECKPOINTING = ("none", "non-reentrant", "reentrant")
PRECISIONS = ("fp32", "bf16")
ACCUMULATION = (1, 2, 4, 8)
RANKS = (1, 2)


@dataclass(frozen=True)
class Cell:
    """One way to carry out the optimizer step; `balancing` is `"phi"`, `"built-in"` or `"none"`."""

    trainer: str
    checkpointing: str
    precision: str
    accumulation: int
    ranks: int
    balancing: str = "phi"
    token_mask: str = "attention"


def all_cells() -> list[Cell]:
    """The full matrix, and the rows of the built-in loss."""
    balanced = [Cell(*axes) for axes in itertools.product(TRAINERS, CHECKPOINTING, PRECISIONS, ACCUMULATION, RANKS)]
    stock = itertools.product(["Trainer"], CHECKPOINTING, ["fp32"], ACCUMULATION, RANKS, ["built-in"])
    return balanced + [Cell(*axes) for axes in stock]
