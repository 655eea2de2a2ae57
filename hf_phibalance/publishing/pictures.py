"""Pictures of a run beside a baseline: the load of its experts, and its learning, over training. They need matplotlib."""

from __future__ import annotations

import os
from pathlib import Path

from ..reporting import short_layer
from .run import Run


LOADS_NAME = "loads.png"
CURVES_NAME = "curves.png"
COLOURS = {"φ-balanced": "tab:blue", "unbalanced": "tab:orange"}
MAX_LAYERS_SHOWN = 8


def draw(folder: str | os.PathLike, run: Run, baseline: Run | None, dpi: int = 130) -> None:
    """Draws the pictures of a report into `folder`."""
    runs = [run] if baseline is None else [baseline, run]
    plot_loads(runs, Path(folder) / LOADS_NAME, dpi)
    plot_curves(runs, Path(folder) / CURVES_NAME, dpi)


def pictures_in(folder: str | os.PathLike) -> list[str]:
    """Names of the report's pictures that are in `folder`."""
    return [name for name in (LOADS_NAME, CURVES_NAME) if (Path(folder) / name).is_file()]


def plot_loads(runs: list[Run], path: str | os.PathLike, dpi: int = 130) -> None:
    """
    Load heatmaps over training, one panel per run: x the step, y layer and expert, colour the relative load.

    Models with more than eight routers are shown by eight of them, evenly spaced.
    """
    from matplotlib.figure import Figure

    layers = _shown_layers(runs)
    sizes = [len(runs[0].loads[0]["load"][layer]) for layer in layers] if layers else []
    height = min(2.0 + 0.16 * sum(sizes), 14.0)
    figure = Figure(figsize=(1.5 + 5.2 * len(runs), max(height, 3.5)), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    image = None
    for panel, run in zip(panels, runs):
        steps = [entry["step"] for entry in run.loads]
        table = [[value for layer in layers for value in entry["load"][layer]] for entry in run.loads]
        if table:
            image = panel.pcolormesh(
                _edges(steps), range(sum(sizes) + 1), list(zip(*table)), cmap="RdBu_r", vmin=0.0, vmax=2.0
            )
        edge = 0
        for size in sizes[:-1]:
            edge += size
            panel.axhline(edge, color="black", linewidth=1.2)
        panel.set_title(run.name)
        panel.set_xlabel("optimizer step")
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    panels[0].set_yticks(
        [start + size / 2 for start, size in zip(starts, sizes)], [short_layer(name) for name in layers]
    )
    panels[0].set_ylabel("layer; one row per expert")
    panels[0].invert_yaxis()
    figure.suptitle(f"Expert load over training, {runs[-1].summary['model_type']}")
    if image is not None:
        figure.colorbar(image, ax=list(panels), label="relative load (1 = fair share)", extend="max")
    figure.savefig(path, dpi=dpi)


def plot_curves(runs: list[Run], path: str | os.PathLike, dpi: int = 130) -> None:
    """MaxVio, exact match and loss over training, one line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    curves = (
        ("moe/max_vio", "MaxVio of training steps", "MaxVio (0 = balanced)"),
        ("eval_exact_match", "Exact match on validation problems", "exact match"),
        ("loss", "Training loss", "loss per answer token"),
    )
    for panel, (key, title, label) in zip(panels, curves):
        for run in runs:
            points = run.series(key)
            if points:
                marker = "o" if len(points) < 30 else None
                panel.plot(
                    *zip(*points),
                    label=run.name,
                    color=COLOURS.get(run.name, "tab:blue"),
                    marker=marker,
                    markersize=4,
                )
        panel.set_title(title)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
    floor = runs[-1].series("moe/noise_floor")
    if floor:
        panels[0].plot(*zip(*floor), label="noise floor", color="grey", linestyle="--", linewidth=1)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 1.02)
    panels[2].set_yscale("log")
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    figure.savefig(path, dpi=dpi)


def _shown_layers(runs: list[Run]) -> list[str]:
    """Routers that every run has, at most eight."""
    recorded = [list(run.loads[0]["load"]) for run in runs if run.loads]
    if not recorded:
        return []
    names = [name for name in recorded[0] if all(name in other for other in recorded)]
    if len(names) <= MAX_LAYERS_SHOWN:
        return names
    return [names[round(i * (len(names) - 1) / (MAX_LAYERS_SHOWN - 1))] for i in range(MAX_LAYERS_SHOWN)]


def _edges(steps: list[int]) -> list[float]:
    """Borders of the cells whose right edges are `steps`."""
    return [0.0 if len(steps) < 2 else max(0.0, steps[0] - (steps[1] - steps[0])), *map(float, steps)]
