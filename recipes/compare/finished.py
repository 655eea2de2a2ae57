"""What there is of a plan: the records and figures of its finished runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .plans import Method, Plan
from .records import Results


Rows = Mapping[str, Mapping[int, Mapping[str, float]]]  # figures by label and seed; no figures of a run that diverged


def figures_of(plan: Plan, results: Results, method: Method, model: str, stream: str) -> dict[int, dict[str, float]]:
    """The figures of the finished runs by seed; empty for one that diverged."""
    found = {}
    for seed in plan.seeds:
        record = results.get(plan.run(method, model, stream, seed))
        if record is not None:
            found[seed] = {} if "diverged_at" in record["metrics"] else record["metrics"]
    return found


def records_of(plan: Plan, results: Results, method: Method, model: str, stream: str) -> list[dict[str, Any]]:
    """The finished runs that did not diverge."""
    records = [results.get(plan.run(method, model, stream, seed)) for seed in plan.seeds]
    return [record for record in records if record is not None and "diverged_at" not in record["metrics"]]


def finished(plan: Plan, results: Results) -> dict[tuple[str, str], Rows]:
    """What there is of a plan, by model and stream."""
    found = {}
    for model in plan.models:
        for stream in plan.streams:
            rows = {m.label: figures_of(plan, results, m, model, stream) for m in plan.methods}
            if any(rows.values()):
                found[model, stream] = rows
    return found
