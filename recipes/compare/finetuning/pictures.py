"""Pictures of finished fine-tuning: what each method does to the loss, to the balance and to what was known before."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from ..records import Results
from .finished import Cell, finished, pairs
from .plans import Plan


def write_pictures(plan: Plan, results: Results, output: Path) -> list[Path]:
    """For each way: differences of the loss and of forgetting to the baseline over MaxVio, a panel for each task."""
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
    palette = colormaps["tab20"]
    for column, task in enumerate(tasks):
        for index, method in enumerate(plan.methods):
            some = list(pairs(found, method.label, plan.baseline, lambda cell, task=task: cell[1:] == (task, way)))
            if not some:
                continue
            max_vio = statistics.fmean(own["max_vio_global"] for own, _ in some)
            for row, name in enumerate(("loss", "forgotten")):
                change = [own[name] - base[name] for own, base in some]
                spread = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0
                axes[row][column].errorbar(
                    max_vio,
                    statistics.fmean(change),
                    spread,
                    marker="o",
                    color=palette(index % 20),
                    label=method.label,
                )
        axes[0][column].set_title(task)
        axes[1][column].set_xlabel("MaxVio on the task")
    for row, name in enumerate(("loss", "forgotten")):
        axes[row][0].set_ylabel(f"{name}, difference to {plan.baseline}")
        for axis in axes[row]:
            axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"{plan.question or plan.name} ({way})")
    figure.tight_layout()
    return figure
