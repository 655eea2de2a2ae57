"""What is printed of the results: the table, the worst cells, machine and versions."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Sequence

import torch

from .cells import ACCUMULATION, PRECISIONS, RANKS
from .measurement import RATIO_BOUND, RESIDUAL_BOUND, Result


def markdown(results: Sequence[Result]) -> str:
    """The table for the README: a row for each trainer, checkpointing and precision, a column for each split."""
    splits = list(itertools.product(RANKS, ACCUMULATION))
    head = ["training", "checkpointing", "precision", *(f"{r}×{a}" for r, a in splits)]
    lines = [head, ["---"] * 3 + ["--:"] * len(splits)]
    rows: dict[tuple, dict[tuple, Result]] = {}
    for result in results:
        cell = result.cell
        key = (cell.balancing, cell.trainer, cell.checkpointing, cell.precision)
        rows.setdefault(key, {})[cell.ranks, cell.accumulation] = result
    for (balancing, trainer, checkpointing, precision), row in rows.items():
        name = trainer if balancing == "phi" else f"{trainer}, built-in loss"
        lines.append([name, checkpointing, precision, *(show(row.get(split)) for split in splits)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(result: Result | None) -> str:
    if result is None:
        return ""
    if result.cell.balancing != "phi":
        return f"{abs(result.ratio):.2f}"
    return f"{result.ratio:.4f}" if result.ok else f"**{result.ratio:.4f}**"


def environment() -> dict[str, str]:
    """Machine and versions."""
    import accelerate
    import transformers
    import trl

    machine = {"machine": f"{platform.machine()}, {os.cpu_count()} CPU cores", "python": platform.python_version()}
    return machine | {module.__name__: module.__version__ for module in (torch, transformers, trl, accelerate)}


def summary(results: Sequence[Result]) -> str:
    """Worst deviation and residual for each precision."""
    lines = []
    for precision in PRECISIONS:
        chosen = [r for r in results if r.cell.precision == precision and r.cell.balancing == "phi"]
        deviation = max(abs(r.ratio - 1) for r in chosen)
        residual = max(r.residual for r in chosen)
        lines.append(
            f"{precision}: {len(chosen)} cells, largest |effective/declared - 1| {deviation:.1e} (bound "
            f"{RATIO_BOUND[precision]:g}), largest residual {residual:.1e} (bound {RESIDUAL_BOUND[precision]:g})"
        )
    return "\n".join(lines)
