"""Pictures of finished runs: loss over MaxVio, and which domain goes to which experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy

from .harness import Cells, Plan, Results, finished
from .measures import SMOOTH
from .tables import mean_spread, pairs_of
from .text import DOMAINS


def write_pictures(plan: Plan, results: Results, output: Path) -> list[Path]:
    """
    Draws, for each model, `<output>/<plan>-<model>-frontier.png` and `-experts.png`; in fine-tuning, for each way,
    `<output>/<plan>-<way>.png`; for a real model and each start, MaxVio over training.
    """
    import matplotlib

    matplotlib.use("Agg")
    found = finished(plan, results)
    found = {cell: rows for cell, rows in found.items() if any(any(seeds.values()) for seeds in rows.values())}
    output.mkdir(parents=True, exist_ok=True)
    figures = {}
    if plan.kind == "finetune":
        for way in dict.fromkeys(way for _, _, way in found):
            # a panel for each base or task
            at = 0 if len(plan.axes["tasks"]) == 1 and len(plan.axes["bases"]) <= 3 else 1
            names = list(plan.axes.values())[at]
            panels = {n: {c: r for c, r in found.items() if c[at] == n and c[2] == way} for n in names}
            name = way.replace(", ", "-").replace(" ", "_")
            figures[name] = draw_frontier(plan, panels, ("loss", "forgotten"), way)
    elif plan.kind == "real":
        for cell in found:
            figures[cell[0].replace(" ", "_")] = draw_training(plan, results, cell)
    else:
        for model in dict.fromkeys(model for model, _ in found):
            panels = {cell[1]: {cell: rows} for cell, rows in found.items() if cell[0] == model}
            figures[f"{model}-frontier"] = draw_frontier(plan, panels, ("loss",), model)
            figures[f"{model}-experts"] = draw_experts(plan, results, next(c for c in found if c[0] == model))
    paths = []
    for name, figure in figures.items():
        paths.append(output / f"{plan.name}-{name}.png")
        figure.savefig(paths[-1], dpi=110, bbox_inches="tight")
        matplotlib.pyplot.close(figure)
    return paths


def draw_frontier(plan: Plan, panels: Mapping[str, Cells], names: Sequence[str], title: str):
    """
    Draws differences to the baseline over MaxVio, with a column for each of `panels` and a row for each figure in
    `names`. Bars are standard errors. Lines join the methods of a family in the order of the plan.
    """
    from matplotlib import colormaps, ticker
    from matplotlib import pyplot as plt

    panels = {name: cells for name, cells in panels.items() if cells}
    size = (3.8 * len(panels) + 2.4, 2.6 * len(names) + 1)
    figure, axes = plt.subplots(
        len(names), len(panels), figsize=size, squeeze=False, sharex="col", layout="constrained"
    )
    families = list(dict.fromkeys(method.family for method in plan.methods))
    colours = dict(zip(families, itertools.cycle(colormaps["tab10" if len(families) <= 10 else "tab20"].colors)))
    handles = {}
    for (row, name), (column, panel) in itertools.product(enumerate(names), enumerate(panels)):
        axis = axes[row][column]
        for family in families:
            labels = [method.label for method in plan.methods if method.family == family]
            settings = [pairs_of(panels[panel], label, plan.baseline) for label in labels]
            settings = [pairs for pairs in settings if pairs]
            changes = [mean_spread([own[name] - base[name] for own, base in pairs]) for pairs in settings]
            bars = [0.0 if math.isnan(s) else s / math.sqrt(len(pairs)) for (_, s), pairs in zip(changes, settings)]
            x = [mean_spread([own["max_vio_global"] for own, _ in pairs])[0] for pairs in settings]
            style = {"marker": "o", "markersize": 4, "linewidth": 1, "color": colours[family]}
            handles[family] = axis.errorbar(x, [mean for mean, _ in changes], bars, label=family, **style)
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.3)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.set(
            title=panel if row == 0 else "",
            xlabel="MaxVio on held-out text" if row == len(names) - 1 else "",
            ylabel=f"{name}, less that of\n{plan.baseline!r}" if column == 0 else "",
        )
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(f"{plan.question or plan.name} ({title})")
    return figure


def draw_training(plan: Plan, results: Results, cell: tuple[str, ...]):
    """Draws MaxVio over the steps of training, the mean of `SMOOTH` steps and of all seeds."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for method in plan.methods:
        records = [record for seed in plan.seeds if (record := results.get(plan.run(method, cell, seed)))]
        curves = [record["curve"]["max_vio"] for record in records if record["curve"].get("max_vio")]
        if curves:
            mean = numpy.convolve(numpy.mean(curves, 0), numpy.full(SMOOTH, 1 / SMOOTH), "valid")
            axis.plot(range(SMOOTH, SMOOTH + len(mean)), mean, label=method.label, linewidth=1.2)
    axis.set(
        xlabel="step", ylabel=f"MaxVio, mean of {SMOOTH} steps", ylim=(0, None), title=f"{plan.question or plan.name}"
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def draw_experts(plan: Plan, results: Results, cell: tuple[str, ...]):
    """Draws the relative load of the experts by domain (1 is the fair share) in the last layer of the first seed's runs."""
    from matplotlib import pyplot as plt

    shares_of = {
        method.label: record["experts"][-1]
        for method in plan.methods
        for seed in reversed(plan.seeds)
        if (record := results.get(plan.run(method, cell, seed))) and record["experts"]
    }
    size = (8, 0.9 * len(shares_of) + 0.8)
    figure, axes = plt.subplots(len(shares_of), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, (label, shares) in zip(axes[:, 0], shares_of.items()):
        by_expert = sorted(zip(*shares), key=lambda column: (column.index(max(column)), -max(column)))
        relative = [[share * len(by_expert) for share in row] for row in zip(*by_expert)]
        image = axis.imshow(relative, aspect="auto", cmap="viridis", vmin=0, vmax=3)
        axis.set_yticks(range(len(DOMAINS)), DOMAINS, fontsize=7)
        axis.set_xticks([])
        axis.set_title(f"{label}, {', '.join(cell)}", fontsize=8, loc="left", pad=2)
    figure.colorbar(image, ax=list(axes[:, 0]), label="load / fair share")
    return figure
