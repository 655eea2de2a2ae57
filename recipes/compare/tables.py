"""Tables of finished runs, in Markdown: means and spreads over seeds, and differences to a baseline paired by seed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .documents import DOMAINS
from .finished import Rows, finished
from .paired import paired_difference, spread_of
from .plain import plain_table
from .plans import Plan
from .records import Results


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
    Column("step_ms", "step, ms", ".0f"),
    Column("peak_mib", "peak memory, MiB", ".0f"),
)
MORE_SHIFT_COLUMNS = (Column("steps_to_old_loss", "steps to the loss before the shift", ".0f"),)


def write_tables(plan: Plan, results: Results, output: Path) -> list[Path]:
    """`<output>/<plan>.md`, if any run of the plan is finished."""
    found = finished(plan, results)
    if not found:
        return []
    parts = [f"# {plan.question or plan.name}", note(plan)]
    if len(found) > 1:
        parts += ["## Overview", OVERVIEW_NOTE, overview(plan, found), SUMMARY_NOTE, summary(plan, found)]
    if plan.portable:
        parts += ["## Served plainly", plain_table(found)]
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
    table for each of its models), `<!-- table: plan, model, stream -->` all figures of one model and stream,
    `<!-- table: plan, all -->` the summary over all of them, and `<!-- table: plan, plain -->` what is left without a
    selection bias.

    Raises:
        ValueError: if a mark names a plan, model or stream of which nothing is finished.
    """
    by_name = {plan.name: plan for plan in plans}

    def renew(match: re.Match) -> str:
        name, *at = match[2].split(", ")
        found = finished(by_name[name], results) if name in by_name else {}
        if not found or (at and at not in (["all"], ["plain"]) and tuple(at) not in found):
            raise ValueError(
                f"the mark '{match[1].strip()}' asks for runs of which none is finished, or no such plan."
            )
        if at == ["plain"]:
            return f"{match[1]}{plain_table(found)}\n{match[3]}"
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
