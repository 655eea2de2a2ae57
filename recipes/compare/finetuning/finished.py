"""What there is of a plan: the figures of its finished runs, and those of the bases as they were."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping

from ..records import Results
from .plans import Plan


Cell = tuple[str, str, str]  # base, task, way
Figures = Mapping[str, float]


def finished(plan: Plan, results: Results) -> dict[Cell, dict[str, dict[int, Figures]]]:
    """
    Figures by cell, label and seed; none of a run that diverged. Each has, beside what was measured, `forgotten`: how much
    the loss on the text of the bases has grown, and means and maxima over the first steps, `first_loss`, `first_loss_max`, ...
    """
    found = {}
    for base, task, way in itertools.product(plan.bases, plan.tasks, plan.ways):
        before = results.get(plan.untouched(base, task))
        rows: dict[str, dict[int, Figures]] = {}
        for method, seed in itertools.product(plan.methods, plan.seeds):
            record = results.get(plan.run(method, base, task, way, seed))
            if record is None or before is None or "diverged_at" in record["metrics"]:
                continue
            figures = record["metrics"]
            grown = figures["base_loss"] - before["metrics"]["base_loss"]
            first = {name: values for name, values in record["curve"].items() if name.startswith("first_")}
            means = {name: statistics.fmean(values) for name, values in first.items()}
            highest = {f"{name}_max": max(values) for name, values in first.items()}
            rows.setdefault(method.label, {})[seed] = {**means, **highest, **figures, "forgotten": grown}
        if rows:
            found[base.name, task, way] = rows
    return found


def untouched(plan: Plan, results: Results) -> dict[tuple[str, str], Figures]:
    """Figures of the bases as they were, by base and task."""
    records = {
        (base.name, task): results.get(plan.untouched(base, task)) for base in plan.bases for task in plan.tasks
    }
    return {at: record["metrics"] for at, record in records.items() if record is not None}


def pairs(
    found: Mapping[Cell, Mapping[str, Mapping[int, Figures]]],
    label: str,
    baseline: str,
    where: Callable[[Cell], bool] = lambda cell: True,
) -> Iterator[tuple[Figures, Figures]]:
    """The figures of a method's runs beside those of the baseline in the same cell and of the same seed."""
    for cell, rows in found.items():
        if where(cell):
            for seed, own in rows.get(label, {}).items():
                if seed in rows.get(baseline, {}):
                    yield own, rows[baseline][seed]
