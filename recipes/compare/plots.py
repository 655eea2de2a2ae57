"""Pictures of finished runs: loss against MaxVio, both over the steps, and which domain goes to which experts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .documents import DOMAINS
from .finished import records_of
from .loop import CURVE_POINTS
from .paired import mean_spread
from .plans import Plan
from .records import Results


def write_pictures(plan: Plan, results: Results, output: Path) -> list[Path]:
    """For each model: loss against MaxVio, the curves over the steps, and which domain goes to which experts."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for model in plan.models:
        found = {
            stream: {
                m.label: records for m in plan.methods if (records := records_of(plan, results, m, model, stream))
            }
            for stream in plan.streams
        }
        found = {stream: by_label for stream, by_label in found.items() if by_label}
        if not found:
            continue
        drawings: dict[str, Callable] = {"frontier": draw_frontier, "curves": draw_curves, "experts": draw_experts}
        for name, draw in drawings.items():
            path = output / f"{plan.name}-{model}-{name}.png"
            figure = draw(plan, found)
            figure.suptitle(f"{plan.question or plan.name} ({model})")
            figure.savefig(path, dpi=110, bbox_inches="tight")
            written.append(path)
            matplotlib.pyplot.close(figure)
    return written


def colour(plan: Plan, label: str) -> Any:
    import matplotlib

    labels = [method.label for method in plan.methods]
    palette = matplotlib.colormaps["tab10" if len(labels) <= 10 else "tab20"]
    return palette(labels.index(label) % palette.N)


def by_seed(records: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {record["settings"]["seed"]: record for record in records}


def less_baseline(records: Sequence[dict], baseline: Sequence[dict], read: Callable[[dict], list[float]]) -> list:
    """`read` of each run less that of the baseline's run of the same seed, for the seeds that both have."""
    base = by_seed(baseline)
    pairs = [(read(record), read(base[seed])) for seed, record in by_seed(records).items() if seed in base]
    return [[value - other for value, other in zip(*pair)] for pair in pairs]


def draw_frontier(plan: Plan, found: Mapping[str, Mapping[str, list[dict]]]):
    """
    Validation loss, less the baseline's of the same seed, against MaxVio_global; a cross of standard deviations for each
    method and a panel for each stream. Losses themselves where the baseline has no finished run.
    """
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, len(found), figsize=(4.6 * len(found) + 2.4, 4.2), squeeze=False, layout="constrained"
    )
    for axis, (stream, by_label) in zip(axes[0], found.items()):
        baseline = by_label.get(plan.baseline)
        for label, records in by_label.items():
            read = lambda record: [record["metrics"]["loss"]]  # noqa: E731
            losses = less_baseline(records, baseline, read) if baseline else [read(record) for record in records]
            if not losses:
                continue
            x, dx = mean_spread([record["metrics"]["max_vio_global"] for record in records])
            y, dy = mean_spread([loss for (loss,) in losses])
            bars = {} if math.isnan(dx) or math.isnan(dy) else {"xerr": dx, "yerr": dy}
            axis.errorbar([x], [y], **bars, fmt="o", capsize=2, color=colour(plan, label), label=label)
        axis.set(title=stream, xlabel="MaxVio over all held-out text")
        _log_axis(axis, "x")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel(f"validation loss, less that of {plan.baseline!r}")
    _legend(figure, axes)
    return figure


def draw_curves(plan: Plan, found: Mapping[str, Mapping[str, list[dict]]]):
    """Training loss less the baseline's of the same seed, and MaxVio of the batch, over the steps; means over seeds."""
    from matplotlib import pyplot as plt

    headings = {"loss": f"training loss, less that of {plan.baseline!r}", "max_vio": "MaxVio of the batch"}
    stretch = math.ceil(plan.steps / CURVE_POINTS / len(DOMAINS)) * len(DOMAINS)
    size = (4.6 * len(found) + 2.4, 6.4)
    figure, axes = plt.subplots(2, len(found), figsize=size, squeeze=False, sharex=True, layout="constrained")
    for column, (stream, by_label) in enumerate(found.items()):
        baseline = by_label.get(plan.baseline)
        for axis, (name, heading) in zip(axes[:, column], headings.items()):
            for label, records in by_label.items():
                read = lambda record, name=name: record["curve"][name]  # noqa: E731
                paired = name == "loss" and baseline
                curves = less_baseline(records, baseline, read) if paired else [read(record) for record in records]
                if not curves:
                    continue
                mean = [statistics.fmean(values) for values in zip(*curves)]
                steps = [min((i + 0.5) * stretch, plan.steps) for i in range(len(mean))]
                axis.plot(steps, mean, color=colour(plan, label), label=label, linewidth=1.2)
            axis.grid(alpha=0.3)
            axis.set_ylabel(heading if column == 0 else "")
        axes[0][column].set_title(stream)
        axes[1][column].set_xlabel("step")
        _log_axis(axes[1][column], "y")
    _legend(figure, axes)
    return figure


def draw_experts(plan: Plan, found: Mapping[str, Mapping[str, list[dict]]]):
    """Relative load of the experts by domain (1 is the fair share) in the last layer, of the first seed and stream."""
    from matplotlib import pyplot as plt

    stream, by_label = next(iter(found.items()))
    figure, axes = plt.subplots(
        len(by_label), 1, figsize=(8, 0.9 * len(by_label) + 0.8), squeeze=False, layout="constrained"
    )
    for axis, (label, records) in zip(axes[:, 0], by_label.items()):
        shares = records[0]["experts"][-1]
        order = sorted(range(len(shares[0])), key=lambda e: favourite(shares, e))
        relative = [[row[e] * len(row) for e in order] for row in shares]
        image = axis.imshow(relative, aspect="auto", cmap="viridis", vmin=0, vmax=3)
        axis.set_yticks(range(len(DOMAINS)), DOMAINS, fontsize=7)
        axis.set_xticks([])
        axis.set_title(f"{label}, {stream}", fontsize=8, loc="left", pad=2)
    figure.colorbar(image, ax=list(axes[:, 0]), label="load / fair share")
    return figure


def favourite(shares: Sequence[Sequence[float]], expert: int) -> tuple[int, float]:
    """Sorts experts by the domain that uses them most, the busiest first."""
    column = [row[expert] for row in shares]
    return column.index(max(column)), -max(column)


def _log_axis(axis, which: str) -> None:
    """Logarithmic, with plain numbers at few ticks."""
    from matplotlib import ticker

    axis.set(**{f"{which}scale": "log"})
    chosen = axis.xaxis if which == "x" else axis.yaxis
    chosen.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    chosen.set_major_formatter(ticker.FormatStrFormatter("%g"))
    chosen.set_minor_formatter(ticker.NullFormatter())


def _legend(figure, axes) -> None:
    """One legend on the right, of every label that any panel has, in the order in which they come."""
    shown = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown.keys(), loc="outside right center", fontsize=8)
