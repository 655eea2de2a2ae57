"""Tables of what is left of a balance without its selection bias, whatever the runs are told apart by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping

from .paired import spread_of
from .portable import PLAIN


Cells = Mapping[tuple[str, ...], Mapping[str, Mapping[int, Mapping[str, float]]]]  # figures by cell, label and seed


SUMMARY_HEADING = (
    "| against the same run with its bias | runs | loss | most | MaxVio, times | at most 1.2 | information, times | least |",
    "|---|" + "---:|" * 7,
)


def plain_table(found: Cells) -> str:
    """For each method what was trained and what is left of it without the selection bias, in each cell and over all."""
    lines = ["| method | served | " + " | ".join(", ".join(cell) for cell in found) + " |"]
    lines.append("|---|---|" + "---:|" * len(found))
    for label in _labels(found):
        biased = any("dropped_loss" in figures for rows in found.values() for figures in rows.get(label, {}).values())
        variants = [("", "with its bias" if biased else "as it is"), *((f"{variant}_", variant) for variant in PLAIN)]
        for prefix, served in variants:
            cells = []
            for rows in found.values():
                runs = [figures for figures in rows.get(label, {}).values() if f"{prefix}loss" in figures]
                parts = (("loss", ".3f"), ("max_vio_global", ".2f"), ("domain_information", ".3f"))
                said = [spread_of([figures[prefix + name] for figures in runs], form) for name, form in parts if runs]
                cells.append(" / ".join(said) or "–")
            if set(cells) != {"–"}:
                lines.append(f"| {label} | {served} | " + " | ".join(cells) + " |")
    summary = list(_summary(found))
    return "\n".join([*lines, "", *SUMMARY_HEADING, *summary] if summary else lines)


def _summary(found: Cells) -> Iterator[str]:
    """What each variant keeps of the run with its bias, over all cells and seeds."""
    for label in _labels(found):
        for variant in PLAIN:
            runs = [f for rows in found.values() for f in rows.get(label, {}).values() if f"{variant}_loss" in f]
            if len(runs) < 2:
                continue
            losses = [f[f"{variant}_loss"] - f["loss"] for f in runs]
            ratios = [f[f"{variant}_max_vio_global"] / f["max_vio_global"] for f in runs]
            kept = [f[f"{variant}_domain_information"] / f["domain_information"] for f in runs]
            cells = [
                f"{len(runs)}",
                f"{statistics.fmean(losses):+.4f} ± {statistics.stdev(losses) / math.sqrt(len(losses)):.4f}",
                f"{max(losses):+.4f}",
                f"{statistics.geometric_mean(ratios):.2f}",
                f"{sum(ratio <= 1.2 for ratio in ratios)}",
                f"{statistics.geometric_mean(kept):.2f}",
                f"{min(kept):.2f}",
            ]
            yield f"| {label}, {variant} | " + " | ".join(cells) + " |"


def _labels(found: Cells) -> list[str]:
    return list(dict.fromkeys(label for rows in found.values() for label in rows))
