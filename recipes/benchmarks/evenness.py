"""
Writes the tables of recipes/guides/EVENNESS.md from committed results.

    python recipes/benchmarks/evenness.py

| table | from | made by |
|---|---|---|
| `measured` | `expert_parallel.json` beside this script | `expert_parallel.py` |
| `predicted` | `../compare/results/main.jsonl` | `../compare.py ../compare/main.yaml --plans methods` |
| `evaluated`, `trained`, `placed` | `../compare/results/capacity.jsonl` | `../compare.py ../compare/capacity.yaml` |
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_phibalance.files import replace_unprintable
from hf_phibalance.maths import busiest_rank, least_busiest_rank, spread_experts


HERE = Path(__file__).parent
RECIPES = HERE.parent
PAGE = RECIPES / "guides" / "EVENNESS.md"
sys.path.append(str(RECIPES))

from compare import tables  # noqa: E402, recipes/ is on the path now
from compare.harness import Plan, Results, finished, load_plans  # noqa: E402


PREDICTED = {"mixtral": (4, 8, 16), "deepseek_v3": (8, 32), "qwen3_moe": (8, 16, 32, 64)}  # ranks by model
PLACED = (("free", "mixtral", 4), ("free", "mixtral", 8), ("many", "qwen3_moe", 8), ("many", "qwen3_moe", 16))
LIMITS = (4.0, 2.0, 1.5, 1.25, 1.0, 0.75)
TRAINED = {"at_1.25": 1.25, "at_0.75": 0.75}  # capacity of a plan


def plans_of(name: str) -> tuple[dict[str, Plan], Results]:
    """Returns the plans of a YAML file of recipes/compare by name, and its committed results."""
    _, plans = load_plans(RECIPES / "compare" / f"{name}.yaml")
    return {plan.name: plan for plan in plans}, Results(RECIPES / "compare" / "results" / f"{name}.jsonl")


def records(plan: Plan, results: Results, label: str, model: str) -> list[dict[str, Any]]:
    """Returns the finished runs of a method, one for each seed."""
    (method,) = [method for method in plan.methods if method.label == label]
    found = [results.get(plan.run(method, (model, "mixed"), seed)) for seed in plan.seeds]
    return [record for record in found if record is not None]


# ---------------------------------------------------------------------- time


def measured() -> str:
    """Measured step time over that of even loads, beside the busiest rank's load over the mean."""
    found = json.loads((HERE / "expert_parallel.json").read_text(encoding="utf-8"))["ranks"]
    heading = ["loads"]
    for ranks in found:
        heading += [f"{ranks} ranks: busiest rank over mean", "step time over that of even loads"]
    rows = []
    for name in next(iter(found.values()))["loads"]:
        row = [name]
        for one in found.values():
            low, middle, high = one["loads"][name]["path"]
            row += [f"{one['loads'][name]['share']:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        rows.append(row)
    return tables.markdown(heading, rows)


def predicted() -> str:
    """The busiest rank's load over the mean, for experts in the order of the checkpoint: mean over layers and seeds."""
    plans, results = plans_of("main")
    plan = plans["methods"]
    heading = ["method", *(f"{model}, {ranks}" for model, many in PREDICTED.items() for ranks in many)]
    rows = []
    for method in plan.methods:
        row = [method.label]
        for model, many in PREDICTED.items():
            loads = [shares(record) for record in records(plan, results, method.label, model)]
            row += [
                tables.show([float(busiest_rank(load_LE, ranks).mean()) for load_LE in loads], ".2f") for ranks in many
            ]
        rows.append(row)
    return tables.markdown(heading, rows)


def shares(record: dict[str, Any]) -> Tensor:
    """Shares of the assignments of a run on held-out text, `(L, E)`, with equal weight for each domain."""
    return torch.tensor(record["experts"], dtype=torch.float64).mean(1)


def placed() -> str:
    """The busiest rank's load over the mean on one half of the held-out text: in order / placed by the loads of the other half / least."""
    plans, results = plans_of("capacity")
    rows = []
    for method in plans["free"].methods:
        row = [method.label]
        for name, model, ranks in PLACED:
            runs = [
                placement_figures(torch.tensor(record["halves"], dtype=torch.float64), ranks)
                for record in records(plans[name], results, method.label, model)
            ]
            row.append(" / ".join(f"{statistics.fmean(values):.2f}" for values in zip(*runs)) or tables.NONE)
        rows.append(row)
    return tables.markdown(["method", *(f"{model}, {ranks} ranks" for _, model, ranks in PLACED)], rows)


def placement_figures(halves_LHE: Tensor, ranks: int) -> list[float]:
    """Returns [`busiest_rank`] on the second half of the text in the order of the checkpoint and as placed, and its bound."""
    fitted_LE, held_LE = halves_LHE.unbind(1)
    order_LE = torch.stack([spread_experts(load_E, ranks) for load_E in fitted_LE])
    linear_L, placed_L = busiest_rank(held_LE, ranks), busiest_rank(held_LE.gather(1, order_LE), ranks)
    return [float(figure_L.mean()) for figure_L in (linear_L, placed_L, least_busiest_rank(held_LE, ranks))]


# ---------------------------------------------------------------------- capacity


def evaluated() -> str:
    """Loss of models that were trained without a limit, by the capacity of the evaluation, and the share dropped at 1.25."""
    plans, results = plans_of("capacity")
    heading = ["method", "n", "no limit", *(f"{factor:g}" for factor in LIMITS), "dropped at 1.25"]
    rows = []
    for name in ("free", "many"):
        (cell,) = plans[name].cells
        for label, by_seed in finished(plans[name], results).get(cell, {}).items():
            runs = [figures for figures in by_seed.values() if figures]
            growth = [
                f"{statistics.fmean(run[f'loss_at_{factor:g}'] - run['loss'] for run in runs):+.3f}"
                if runs
                else tables.NONE
                for factor in LIMITS
            ]
            dropped = tables.show_mean([(run, run) for run in runs], "dropped_at_1.25", ".0%")
            rows.append(
                [
                    f"{cell[0]}, {label}",
                    f"{len(runs)}",
                    tables.show([run["loss"] for run in runs], ".3f"),
                    *growth,
                    dropped,
                ]
            )
    return tables.markdown(heading, rows)


def trained() -> str:
    """Loss of models at the capacity of their training, its difference to no balancing, and the loss without a limit."""
    plans, results = plans_of("capacity")
    heading, rows = ["method", "n"], {}
    for name, factor in TRAINED.items():
        (cell,) = plans[name].cells
        found, figure = finished(plans[name], results), f"loss_at_{factor:g}"
        heading += [f"trained and evaluated at {factor:g}", "Δ to none", "evaluated without a limit"]
        for label, by_seed in found[cell].items():
            difference = tables.show_difference(tables.pairs_of(found, label, "none"), figure, ".3f", error=False)
            limited, free = (tables.show([run[at] for run in by_seed.values()], ".3f") for at in (figure, "loss"))
            row = rows.setdefault(label, [label, f"{len(by_seed)}"])
            row += [limited, "" if label == "none" else difference, free]
    return tables.markdown(heading, rows.values())


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (measured, predicted, placed, evaluated, trained)
}


def updated(page: str) -> str:
    """Returns `page` with its tables made anew."""
    marked = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    return marked.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


if __name__ == "__main__":
    replace_unprintable()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
