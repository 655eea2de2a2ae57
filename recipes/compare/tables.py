# Copyright 2026 The hf_phibalance authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of finished runs: means and spreads over seeds, and differences to a baseline paired by seed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop import CURVE_POINTS
from plans import Method, Plan
from records import Results
from streams import DOMAINS


Rows = Mapping[str, Mapping[int, Mapping[str, float]]]  # figures by label and seed; no figures of a run that diverged


@dataclass(frozen=True)
class Column:
    """A figure of a run: its heading, how it is printed, whether its difference to the baseline is shown as well."""

    name: str
    heading: str
    form: str = ".3f"
    paired: bool = False


COLUMNS = (
    Column("loss", "validation loss", paired=True),
    Column("max_vio_global", "MaxVio global", paired=True),
    Column("max_vio_train_batch", "MaxVio batch", ".2f"),
    Column("gini", "Gini"),
    Column("dead_experts", "dead experts", ".1f"),
    Column("churn", "churn", ".2%"),
    Column("domain_information", "domain information, bits"),
)
SHIFT_COLUMNS = (
    Column("recovery_steps", "steps to recover", ".0f"),
    Column("max_vio_after_shift", "MaxVio batch after the shift", ".2f"),
    Column("loss_after_shift", "loss after the shift"),
)
# Folded away below the table.
MORE_COLUMNS = (
    *(Column(f"loss_{domain}", f"loss, {domain}") for domain in DOMAINS),
    Column("max_vio_worst_layer", "MaxVio global, worst layer", ".2f"),
    Column("max_vio_mixed_batch", "held-out batch of all domains", ".2f"),
    Column("max_vio_domain_batch", "held-out batch of one domain", ".2f"),
    Column("step_ms", "step, CPU ms", ".0f"),
)
MORE_SHIFT_COLUMNS = (Column("steps_to_old_loss", "steps to the loss before the shift", ".0f"),)
# Two-sided 95% quantiles of Student's t by degrees of freedom, for up to ten seeds; a normal distribution beyond.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1; `nan` for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, float, bool]:
    """
    Mean and sample standard deviation of `values[seed] - baseline[seed]` over the seeds that both have, and whether the
    mean is further from 0 than a two-sided t-test at 5% allows for (never with a single seed).

    Raises:
        ValueError: if they have no seed in common.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        raise ValueError("the two have no seed in common, there is nothing to pair.")
    mean, spread = mean_spread(differences)
    count = len(differences)
    if count < 2:
        return mean, spread, False
    quantile = T95[count - 2] if count - 2 < len(T95) else 1.96
    return mean, spread, abs(mean) > quantile * spread / math.sqrt(count)


# ---------------------------------------------------------------------- what there is


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


# ---------------------------------------------------------------------- tables


def finished(plan: Plan, results: Results) -> dict[tuple[str, str], Rows]:
    """What there is of a plan, by model and stream."""
    found = {}
    for model in plan.models:
        for stream in plan.streams:
            rows = {m.label: figures_of(plan, results, m, model, stream) for m in plan.methods}
            if any(rows.values()):
                found[model, stream] = rows
    return found


def write_tables(plan: Plan, results: Results, output: Path) -> list[Path]:
    """`<output>/<plan>.md`, if any run of the plan is finished."""
    found = finished(plan, results)
    if not found:
        return []
    parts = [f"# {plan.question or plan.name}", note(plan)]
    if len(found) > 1:
        parts += ["## Overview", OVERVIEW_NOTE, overview(plan, found), SUMMARY_NOTE, summary(plan, found)]
    for (model, stream), rows in found.items():
        parts += [f"## {model}, {stream}", main_table(plan, rows, stream)]
        if best := best_of_families(plan, rows):
            parts.append(best)
        more = table(plan, rows, [*MORE_COLUMNS, *MORE_SHIFT_COLUMNS * (stream == "shift")])
        parts.append(f"<details><summary>More figures</summary>\n\n{more}\n\n</details>")
    path = output / f"{plan.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [path]


def refresh(text: str, plans: Sequence[Plan], results: Results) -> str:
    """
    `text` with its marked tables made anew: `<!-- table: plan -->` ... `<!-- /table -->` is the overview of a plan (a
    table for each of its models), `<!-- table: plan, model, stream -->` all figures of one model and stream, and
    `<!-- table: plan, all -->` the summary over all of them.

    Raises:
        ValueError: if a mark names a plan, model or stream of which nothing is finished.
    """
    by_name = {plan.name: plan for plan in plans}

    def renew(match: re.Match) -> str:
        name, *at = match[2].split(", ")
        found = finished(by_name[name], results) if name in by_name else {}
        if not found or (at and at != ["all"] and tuple(at) not in found):
            raise ValueError(
                f"the mark '{match[1].strip()}' asks for runs of which none is finished, or no such plan."
            )
        if at == ["all"]:
            return f"{match[1]}{summary(by_name[name], found)}\n{match[3]}"
        if at:
            return f"{match[1]}{main_table(by_name[name], found[at[0], at[1]], at[1])}\n{match[3]}"
        models = {model: {key: rows for key, rows in found.items() if key[0] == model} for model, _ in found}
        made = "\n\n".join(overview(by_name[name], some) for some in models.values())
        return f"{match[1]}{made}\n{match[3]}"

    return re.sub(r"(<!-- table: ([^>]+) -->\n).*?(<!-- /table -->)", renew, text, flags=re.DOTALL)


def main_table(plan: Plan, rows: Rows, stream: str) -> str:
    return table(plan, rows, [*COLUMNS, *SHIFT_COLUMNS * (stream == "shift")])


OVERVIEW_NOTE = (
    "Validation loss (difference to the baseline) / MaxVio over all held-out text; mean ± standard deviation."
)


SUMMARY_NOTE = (
    "Over all models, streams and seeds, paired with the baseline's run: mean difference of the loss ± its standard error; "
    "geometric mean of the ratio of MaxVio; in how many pairs each is lower."
)


def note(plan: Plan) -> str:
    seeds = f"seeds {', '.join(map(str, plan.seeds))}; n is how many are finished"
    parts = f", each in {plan.micro_batches} micro-batches" if plan.micro_batches > 1 else ""
    return (
        f"{plan.steps} steps of {plan.rows} x {plan.window} tokens{parts}. Mean ± standard deviation over the seeds "
        f"({seeds}). Δ: difference to `{plan.baseline}`, paired by seed; * where a paired t-test at 5% tells it from 0."
    )


def overview(plan: Plan, found: Mapping[tuple[str, str], Rows]) -> str:
    """One markdown table over all models and streams, a row for each method."""
    lines = ["| method | " + " | ".join(f"{model}, {stream}" for model, stream in found) + " |"]
    lines.append("|---|" + "---:|" * len(found))
    for method in plan.methods:
        cells = []
        for rows in found.values():
            fine = {seed: figures for seed, figures in rows[method.label].items() if figures}
            if not fine:
                cells.append("diverged" if rows[method.label] else "–")
                continue
            losses = {seed: figures["loss"] for seed, figures in fine.items()}
            base = {seed: figures["loss"] for seed, figures in rows[plan.baseline].items() if figures}
            text = f"{statistics.fmean(losses.values()):.3f}"
            if method.label != plan.baseline and set(losses) & set(base):
                text += f" ({signed(*paired_difference(losses, base), '.3f')})"
            cells.append(f"{text} / {spread_of([f['max_vio_global'] for f in fine.values()], '.2f')}")
        lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(plan: Plan, found: Mapping[tuple[str, str], Rows]) -> str:
    """One markdown table of each method against the baseline, all models, streams and seeds taken together."""
    heading = f"| against {plan.baseline} | pairs | loss | lower | MaxVio, times | lower |"
    lines = [heading, "|---|" + "---:|" * 5]
    for method in plan.methods:
        pairs = [
            (figures, rows[plan.baseline][seed])
            for rows in found.values()
            for seed, figures in rows[method.label].items()
            if figures and rows[plan.baseline].get(seed)
        ]
        if method.label == plan.baseline or len(pairs) < 2:
            continue
        losses = [own["loss"] - base["loss"] for own, base in pairs]
        ratios = [own["max_vio_global"] / base["max_vio_global"] for own, base in pairs]
        error = statistics.stdev(losses) / math.sqrt(len(losses))
        cells = [
            f"{len(pairs)}",
            f"{statistics.fmean(losses):+.4f} ± {error:.4f}",
            f"{sum(loss < 0 for loss in losses)}",
            f"{statistics.geometric_mean(ratios):.2f}",
            f"{sum(ratio < 1 for ratio in ratios)}",
        ]
        lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table(plan: Plan, rows: Rows, columns: Sequence[Column]) -> str:
    """One markdown table: a row for each method that has a finished run, in the order of the plan."""
    headings = ["method", "n"]
    for column in columns:
        headings += [column.heading, "Δ"] if column.paired else [column.heading]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for label, by_seed in rows.items():
        if not by_seed:
            continue
        fine = {seed: figures for seed, figures in by_seed.items() if figures}
        diverged = len(by_seed) - len(fine)
        cells = [label, f"{len(fine)}" + (f", {diverged} diverged" if diverged else "")]
        for column in columns:
            values = {seed: figures[column.name] for seed, figures in fine.items() if column.name in figures}
            cells.append(cell(column, list(values.values())))
            if column.paired:
                cells.append(delta(column, label, values, rows[plan.baseline], plan.baseline))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(column: Column, values: Sequence[float]) -> str:
    if not values:
        return "–"
    return spread_of(values, column.form)


def delta(column: Column, label: str, values: Mapping[int, float], baseline: Mapping, name: str) -> str:
    base = {seed: figures[column.name] for seed, figures in baseline.items() if column.name in figures}
    if label == name or not set(values) & set(base):
        return "" if label == name else "–"
    return signed(*paired_difference(values, base), column.form)


def spread_of(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation, in print."""
    mean, spread = mean_spread(values)
    return f"{mean:{form}}" if math.isnan(spread) else f"{mean:{form}} ± {spread:{form}}"


def signed(mean: float, spread: float, told: bool, form: str) -> str:
    """A difference, in print, with a star where it can be told from 0."""
    text = f"{mean:+{form}}" if math.isnan(spread) else f"{mean:+{form}} ± {spread:{form}}"
    return text + " *" * told


def best_of_families(plan: Plan, rows: Rows) -> str:
    """For each family of several settings the one with the least mean loss and the one with the least mean MaxVio."""
    families: dict[str, list[str]] = {}
    for method in plan.methods:
        families.setdefault(method.family, []).append(method.label)
    lines = []
    for family, labels in families.items():
        if len(labels) < 2:
            continue
        said = []
        for name, heading in (("loss", "loss"), ("max_vio_global", "MaxVio global")):
            means = {}
            for label in labels:
                values = [figures[name] for figures in rows.get(label, {}).values() if figures]
                if values:
                    means[label] = statistics.fmean(values)
            if means:
                best = min(means, key=means.__getitem__)
                said.append(f"{heading} {means[best]:.3f} with `{best}`")
        if said:
            lines.append(f"- Best of the {len(labels)} settings of *{family}*: " + "; ".join(said) + ".")
    return "\n".join(lines)


# ---------------------------------------------------------------------- pictures


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
