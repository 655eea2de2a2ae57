"""Pictures of a run beside a baseline: expert load over training, and learning curves. They need matplotlib."""

from __future__ import annotations

import os
from itertools import accumulate
from pathlib import Path

from ..files import layer_labels
from .run import Run


LOADS_NAME = "loads.png"
CURVES_NAME = "curves.png"
COLOURS = {"φ-balanced": "tab:blue", "unbalanced": "tab:orange"}
MAX_LAYERS_SHOWN = 8
CURVES = (
    ("moe/max_vio", "MaxVio of training steps", "MaxVio (0 = balanced)"),
    ("eval_exact_match", "Exact match on validation problems", "exact match"),
    ("loss", "Training loss", "loss per answer token"),
)


def draw(folder: str | os.PathLike, run: Run, baseline: Run | None, dpi: int = 130) -> None:
    """Draws the pictures of a run into `folder`."""
    runs = [run] if baseline is None else [baseline, run]
    plot_loads(runs, Path(folder, LOADS_NAME), dpi)
    plot_curves(runs, Path(folder, CURVES_NAME), dpi)


def pictures_in(folder: str | os.PathLike) -> list[str]:
    """Returns the names of the pictures in `folder`."""
    return [name for name in (LOADS_NAME, CURVES_NAME) if Path(folder, name).is_file()]


def plot_loads(runs: list[Run], path: str | os.PathLike, dpi: int = 130) -> None:
    """
    Draws one heatmap of expert load per run: x is the step, y the layer and expert, colour the load over the mean
    load. Shows at most eight routers, evenly spaced.
    """
    from matplotlib.figure import Figure

    layers = _shown_layers(runs)
    sizes = [len(runs[0].loads[0]["load"][layer]) for layer in layers]
    starts = list(accumulate(sizes, initial=0))
    height = min(max(2.0 + 0.16 * starts[-1], 3.5), 14.0)
    figure = Figure(figsize=(1.5 + 5.2 * len(runs), height), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for panel, run in zip(panels, runs):
        if layers:
            steps = [entry["step"] for entry in run.loads]
            first = max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0
            rows = zip(*([value for layer in layers for value in entry["load"][layer]] for entry in run.loads))
            edges = [first, *steps], range(starts[-1] + 1)
            image = panel.pcolormesh(*edges, list(rows), cmap="RdBu_r", vmin=0.0, vmax=2.0)
        for start in starts[1:-1]:
            panel.axhline(start, color="black", linewidth=1.2)
        panel.set(title=run.name, xlabel="optimizer step")
    middles = [start + size / 2 for start, size in zip(starts, sizes)]
    panels[0].set_yticks(middles, layer_labels(layers))
    panels[0].set_ylabel("layer; one row per expert")
    panels[0].invert_yaxis()
    figure.suptitle(f"Expert load over training, {runs[-1].model_type}")
    if layers:
        figure.colorbar(image, ax=list(panels), label="relative load (1 = fair share)", extend="max")
    figure.savefig(path, dpi=dpi)


def plot_curves(runs: list[Run], path: str | os.PathLike, dpi: int = 130) -> None:
    """Draws MaxVio, exact match (if it was measured during training) and loss over training, one line per run."""
    from matplotlib.figure import Figure

    curves = [curve for curve in CURVES if curve[0] != "eval_exact_match" or any(run.series(curve[0]) for run in runs)]
    figure = Figure(figsize=(14 / 3 * len(curves), 4), layout="constrained")
    panels = figure.subplots(1, len(curves))
    for panel, (key, title, label) in zip(panels, curves):
        for run in runs:
            if points := run.series(key):
                style = {"color": COLOURS.get(run.name, "tab:blue"), "marker": "o" if len(points) < 30 else None}
                panel.plot(*zip(*points), label=run.name, markersize=4, **style)
        panel.set(title=title, xlabel="optimizer step", ylabel=label)
        panel.grid(alpha=0.3)
    if floor := runs[-1].series("moe/noise_floor"):
        panels[0].plot(*zip(*floor), label="noise floor", color="grey", linestyle="--", linewidth=1)
    panels[0].set_ylim(bottom=0)
    if len(panels) == 3:
        panels[1].set_ylim(0, 1.02)
    panels[-1].set_yscale("log")
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.savefig(path, dpi=dpi)


def _shown_layers(runs: list[Run]) -> list[str]:
    """Returns the routers that every run has, at most eight."""
    recorded = [run.loads[0]["load"] if run.loads else {} for run in runs]
    names = [name for name in recorded[0] if all(name in other for other in recorded)]
    count = min(len(names), MAX_LAYERS_SHOWN)
    return [names[round(index * (len(names) - 1) / max(1, count - 1))] for index in range(count)]
