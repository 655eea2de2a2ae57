"""Pictures of finished fine-tuning: what each method does to the loss, to the balance and to what was known before."""

from __future__ import annotations

import itertools
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path

from ..records import Results
from .finished import Cell, finished, pairs
from .plans import Plan


def write_pictures(plan: Plan, results: Results, output: Path) -> list[Path]:
    """
    For each way: differences of the loss and of forgetting to the baseline over MaxVio, a panel for each task. Lines join the
    settings of a family in the order of the plan.
    """
    import matplotlib

    matplotlib.use("Agg")
    found = finished(plan, results)
    written = []
    for way in dict.fromkeys(way for _, _, way in found):
        figure = draw(plan, found, way)
        path = output / f"{plan.name}-{way.replace(', ', '-').replace(' ', '_')}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, bbox_inches="tight")
        matplotlib.pyplot.close(figure)
        written.append(path)
    return written


def draw(plan: Plan, found: Mapping[Cell, Mapping], way: str):
    from matplotlib import colormaps
    from matplotlib import pyplot as plt

    tasks = [task for task in plan.tasks if any(cell[1:] == (task, way) for cell in found)]
    figure, axes = plt.subplots(2, len(tasks), figsize=(3.4 * len(tasks) + 1.6, 5.6), squeeze=False, sharex=True)
    families = list(dict.fromkeys(method.family for method in plan.methods))
    colors = dict(zip(families, itertools.cycle(colormaps["tab10" if len(families) <= 10 else "tab20"].colors)))
    for column, task in enumerate(tasks):
        for family in families:
            labels = [method.label for method in plan.methods if method.family == family]
            per_label = [
                list(pairs(found, label, plan.baseline, lambda cell, task=task: cell[1:] == (task, way)))
                for label in labels
            ]
            settings = [some for some in per_label if some]
            max_vios = [statistics.fmean(own["max_vio_global"] for own, _ in some) for some in settings]
            for row, name in enumerate(("loss", "forgotten")):
                changes = [[own[name] - base[name] for own, base in some] for some in settings]
                axes[row][column].errorbar(
                    max_vios,
                    [statistics.fmean(change) for change in changes],
                    [statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0 for change in changes],
                    marker="o",
                    markersize=4,
                    linewidth=1,
                    color=colors[family],
                    label=family,
                )
        axes[0][column].set_title(task)
        axes[1][column].set_xlabel("MaxVio on the task")
    for row, name in enumerate(("loss", "forgotten")):
        axes[row][0].set_ylabel(textwrap.fill(f"{name}, difference to {plan.baseline}", 36))
        for axis in axes[row]:
            axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{plan.question or plan.name} ({way})")
    figure.tight_layout()
    return figure
