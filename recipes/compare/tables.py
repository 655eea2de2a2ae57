"""
Tables of finished runs, in Markdown.

A document marks a table by `<!-- table: PLAN; WHAT -->` ... `<!-- /table -->`. WHAT is

| | table |
|---|---|
| `plain` | models as served without their selection bias |
| a cell, as `mixtral; blocked` or `mixtral balanced; near; full` | all figures of its runs |
| `overview` | loss and MaxVio of every cell; a table for each model, in fine-tuning one for all bases |
| `all` | from scratch: each method against the baseline over all cells and seeds |
| `bases` | fine-tuning: the bases as they are |
| a way, as `full` | fine-tuning: each method against the baseline over all bases, tasks and seeds |
| `full; tasks`, `full; bases` | the same for each task or base: loss and score |
| `full; first` | the first steps |
| `full; A against B` | two methods against each other |
| `full; loss along A` | families of methods against the family A at the same MaxVio, by base |

Means are ± standard deviation over seeds. Differences are paired by cell and seed: ± the standard deviation of the
pairs in tables of one cell, ± the standard error in tables over cells. `*` marks differences that are significant in a
paired t-test at 5%.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.interpolate import PchipInterpolator
from scipy.special import stdtrit

from .harness import Cells, Plan, Results, finished
from .text import DOMAINS
from .training import PLAIN


Figures = Mapping[str, float]
Pairs = Sequence[tuple[Figures, Figures]]  # of a method and of the baseline
NONE = "–"


# ---------------------------------------------------------------------- statistics


def is_told(mean: float, spread: float, count: int) -> bool:
    """True if the mean of `count` values with this standard deviation differs from 0 in a two-sided t-test at 5%."""
    return count > 1 and abs(mean) > float(stdtrit(count - 1, 0.975)) * spread / math.sqrt(count)


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1; `nan` for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def show(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation."""
    if not values:
        return NONE
    mean, spread = mean_spread(values)
    return f"{mean:{form}}" if math.isnan(spread) else f"{mean:{form}} ± {spread:{form}}"


def show_mean(pairs: Pairs, name: str, form: str) -> str:
    """Mean over the method's runs that have the figure."""
    values = [own[name] for own, _ in pairs if name in own]
    return f"{statistics.fmean(values):{form}}" if values else NONE


def show_difference(pairs: Pairs, name: str, form: str, error: bool = True) -> str:
    """Mean difference ± standard error (or standard deviation), with a star if it is significant."""
    differences = [own[name] - base[name] for own, base in pairs if name in own and name in base]
    if not differences:
        return NONE
    count = len(differences)
    mean, spread = mean_spread(differences)
    if math.isnan(spread):
        return f"{mean:+{form}}"
    return f"{mean:+{form}} ± {spread / math.sqrt(count) if error else spread:{form}}" + " *" * is_told(
        mean, spread, count
    )


def pairs_of(found: Cells, label: str, other: str, where: Callable[[tuple], bool] = lambda cell: True) -> Pairs:
    """Returns the figures of a method's runs with those of `other` in the same cell and of the same seed."""
    return [
        (own, rows[other][seed])
        for cell, rows in found.items()
        if where(cell)
        for seed, own in rows[label].items()
        if own and rows[other].get(seed)
    ]


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """Returns a table whose first `names` columns are text. Leaves out rows without figures."""
    lines = [heading, *(row for row in rows if set(row[names:]) - {NONE})]
    made = ["| " + " | ".join(line) + " |" for line in lines]
    made.insert(1, "|" + "---|" * names + "---:|" * (len(heading) - names))
    return "\n".join(made)


# ---------------------------------------------------------------------- documents


def refresh(document: str, plans: Sequence[Plan], results: Results) -> str:
    """Returns `document` with its marked tables updated. Raises `ValueError` for a mark without a finished run."""
    by_name = {plan.name: plan for plan in plans}
    found = functools.cache(lambda name: finished(by_name[name], results))

    def renew(mark: re.Match) -> str:
        name, _, what = mark[2].partition("; ")
        made = make(by_name[name], results, what, found(name)) if name in by_name else ""
        if not made:
            raise ValueError(f"the mark '{mark[1].strip()}' asks for no table of a plan of which runs are finished.")
        return f"{mark[1]}{made}\n{mark[3]}"

    return re.sub(r"(<!-- table: ([^>]+) -->\n).*?(<!-- /table -->)", renew, document, flags=re.DOTALL)


def write_tables(plan: Plan, results: Results, output: Path) -> list[Path]:
    """Writes all tables of a plan to `<output>/<plan>.md`, if any of its runs is finished."""
    found = finished(plan, results)
    if not found:
        return []
    wanted = ["plain"] * bool(plan.settings.get("portable") and plan.kind != "real")
    if plan.kind == "finetune":
        ways = dict.fromkeys(way for _, _, way in found)
        wanted = ["bases", *(f"{way}{part}" for way in ways for part in ("", "; tasks", "; bases")), *wanted]
    elif len(found) > 1:
        wanted = ["overview", "all", *wanted]
    note = {"baseline": plan.baseline, "seeds": plan.seeds, **plan.settings}
    parts = [f"# {plan.question or plan.name}", ", ".join(f"{name} {value}" for name, value in note.items())]
    for what in [*wanted, *("; ".join(cell) for cell in found)]:
        parts += [f"## {what}", make(plan, results, what, found, more=True)]
    path = output / f"{plan.name}.md"
    output.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [path]


def make(plan: Plan, results: Results, what: str, found: Cells, more: bool = False) -> str:
    """Returns the table of a mark of `plan`, empty if there is none. `more` adds rarer figures of a cell."""
    at = tuple(what.split("; "))
    if not found:
        return ""
    if what == "plain":
        return plain_table(found)
    if at in found:
        return cell_table(plan, found[at], more)
    if what == "overview":
        return overview(plan, found)
    if plan.kind != "finetune":
        return summary(plan, found) if what == "all" else ""
    if at == ("bases",):
        return bases_table(plan, results)
    way, part = at if len(at) == 2 else (what, "")
    of_way = {cell: rows for cell, rows in found.items() if cell[2] == way}
    if not of_way:
        return ""
    if " against " in part:
        return versus_table(of_way, *part.split(" against "))
    if " along " in part:
        return along_table(plan, of_way, *part.split(" along "))
    tables = {"": way_table, "first": first_table}
    tables |= {name: functools.partial(parts_table, part=part) for name, part in (("bases", 0), ("tasks", 1))}
    return tables[part](plan, of_way) if part in tables else ""


# ---------------------------------------------------------------------- all kinds


@dataclass(frozen=True)
class Column:
    """A figure: its heading, its format, and whether to show its difference to the baseline."""

    name: str
    heading: str
    form: str = ".3f"
    paired: bool = False


COLUMNS = {
    "scratch": (
        Column("loss", "validation loss", paired=True),
        Column("max_vio_global", "MaxVio global", paired=True),
        Column("max_vio_train_batch", "MaxVio batch", ".2f"),
        Column("gini", "Gini"),
        Column("dead_experts", "dead experts", ".1f"),
        Column("churn", "churn", ".2%"),
        Column("domain_information", "domain information, bits"),
        Column("recovery_steps", "steps to recover", ".0f"),
        Column("max_vio_after_shift", "MaxVio batch after the shift", ".2f"),
        Column("loss_after_shift", "loss after the shift"),
    ),
    "finetune": (
        Column("loss", "loss"),
        Column("score", "score", ".1%"),
        Column("forgotten", "forgotten"),
        Column("max_vio_global", "MaxVio, task", ".2f"),
        Column("base_max_vio", "MaxVio, own text", ".2f"),
        Column("max_vio_train_batch", "MaxVio, batch", ".2f"),
        Column("rerouted", "rerouted", ".1%"),
        Column("domain_information", "information, bits"),
    ),
    "real": (
        Column("loss", "loss on answers", ".4f", paired=True),
        Column("score", "exact match", ".1%"),
        Column("forgotten", "WikiText-2 loss, rise", ".4f"),
        Column("max_vio_global", "MaxVio", ".3f"),
        Column("max_vio_first", "MaxVio, first layer", ".3f"),
        Column("dropped_max_vio_global", "MaxVio without the bias", ".3f"),
        Column("dropped_loss", "loss without the bias", ".4f"),
        Column("base_max_vio", "MaxVio, three domains", ".2f"),
        Column("domain_information", "information, bits", ".4f"),
        Column("steps_until_even", "steps until even", ".0f"),
    ),
}
MORE_COLUMNS = (
    *(Column(f"loss_{domain}", f"loss, {domain}") for domain in DOMAINS),
    Column("max_vio_worst_layer", "MaxVio global, worst layer", ".2f"),
    Column("max_vio_mixed_batch", "held-out batch of all domains", ".2f"),
    Column("max_vio_domain_batch", "held-out batch of one domain", ".2f"),
    Column("steps_to_old_loss", "steps to the loss before the shift", ".0f"),
    Column("step_ms", "step, ms", ".0f"),
    Column("peak_mib", "peak memory, MiB", ".0f"),
)


def cell_table(plan: Plan, rows: Mapping[str, Mapping[int, Figures]], more: bool = False) -> str:
    """Returns a table with a row for each method that has a finished run, and the columns that any run has."""
    wanted = (*COLUMNS[plan.kind], *MORE_COLUMNS * more)
    columns = [c for c in wanted if any(c.name in figures for seeds in rows.values() for figures in seeds.values())]
    heading = ["method", "n"]
    for column in columns:
        heading += [column.heading, "Δ"] if column.paired else [column.heading]
    made = []
    for label, by_seed in rows.items():
        fine = [figures for figures in by_seed.values() if figures]
        diverged = len(by_seed) - len(fine)
        cells = [label, f"{len(fine)}" + f", {diverged} diverged" * bool(diverged)]
        for column in columns:
            cells.append(show([figures[column.name] for figures in fine if column.name in figures], column.form))
            if column.paired:
                pairs = pairs_of({(): rows}, label, plan.baseline)
                difference = show_difference(pairs, column.name, column.form, error=False)
                cells.append("" if label == plan.baseline else difference)
        made.append(cells if by_seed else [])
    return markdown(heading, filter(None, made))


def plain_table(found: Cells) -> str:
    """Compares models served without their selection bias with the same runs with it, by cell and over all cells."""
    labels = list(dict.fromkeys(label for rows in found.values() for label in rows))
    made, summary = [], []
    for label in labels:
        runs = [[figures for figures in rows[label].values() if figures] for rows in found.values()]
        biased = any("dropped_loss" in figures for cell in runs for figures in cell)
        variants = {"": "with its bias" if biased else "as it is"} | {f"{variant}_": variant for variant in PLAIN}
        for prefix, served in variants.items():
            of_cells = ([figures for figures in cell if f"{prefix}loss" in figures] for cell in runs)
            made.append([label, served, *(_plain_figures(some, prefix) for some in of_cells)])
        for variant in PLAIN:
            measured = [figures for cell in runs for figures in cell if f"{variant}_loss" in figures]
            if len(measured) > 1:
                summary.append([f"{label}, {variant}", *_kept(measured, variant)])
    heading = ["method", "served", *(", ".join(cell) for cell in found)]
    table = markdown(heading, made, names=2)
    heading = ["against the same run with its bias", "runs", "loss", "most", "MaxVio, times", "at most 1.2"]
    return f"{table}\n\n{markdown([*heading, 'information, times', 'least'], summary)}" if summary else table


def _plain_figures(runs: Sequence[Figures], prefix: str) -> str:
    forms = {"loss": ".3f", "max_vio_global": ".2f", "domain_information": ".3f"}
    return " / ".join(show([run[prefix + name] for run in runs], form) for name, form in forms.items() if runs) or NONE


def _kept(runs: Sequence[Figures], variant: str) -> Iterator[str]:
    """Yields what a variant keeps of the runs with their bias."""
    losses = [run[f"{variant}_loss"] - run["loss"] for run in runs]
    ratios = [run[f"{variant}_max_vio_global"] / run["max_vio_global"] for run in runs]
    kept = [run[f"{variant}_domain_information"] / run["domain_information"] for run in runs]
    yield f"{len(runs)}"
    yield f"{statistics.fmean(losses):+.4f} ± {statistics.stdev(losses) / math.sqrt(len(losses)):.4f}"
    yield f"{max(losses):+.4f}"
    yield f"{statistics.geometric_mean(ratios):.2f}"
    yield f"{sum(ratio <= 1.2 for ratio in ratios)}"
    yield f"{statistics.geometric_mean(kept):.2f}"
    yield f"{min(kept):.2f}"


def overview(plan: Plan, found: Cells) -> str:
    """Loss (difference to the baseline) / MaxVio of each cell; a table for each model, in fine-tuning one for all bases."""
    made = []
    for model in ("",) if plan.kind == "finetune" else dict.fromkeys(cell[0] for cell in found):
        cells = [cell for cell in found if model in (cell[0], "")]
        rows = (
            [method.label, *(_overview_cell(plan, found[c], method.label) for c in cells)] for method in plan.methods
        )
        made.append(markdown(["method", *(", ".join(cell) for cell in cells)], rows))
    return "\n\n".join(made)


def _overview_cell(plan: Plan, rows: Mapping[str, Mapping[int, Figures]], label: str) -> str:
    fine = [figures for figures in rows[label].values() if figures]
    if not fine:
        return "diverged" if rows[label] else NONE
    difference = show_difference(pairs_of({(): rows}, label, plan.baseline), "loss", ".3f", error=False)
    shown = "" if label == plan.baseline or difference == NONE else f" ({difference})"
    loss = statistics.fmean(figures["loss"] for figures in fine)
    return f"{loss:.3f}{shown} / {show([figures['max_vio_global'] for figures in fine], '.2f')}"


# ---------------------------------------------------------------------- from scratch


def summary(plan: Plan, found: Cells) -> str:
    """Each method against the baseline over all models, streams and seeds."""
    heading = [f"against {plan.baseline}", "pairs", "loss", "lower", "MaxVio, times", "lower"]
    made = []
    for method in plan.methods:
        pairs = pairs_of(found, method.label, plan.baseline)
        if method.label == plan.baseline or len(pairs) < 2:
            continue
        losses = [own["loss"] - base["loss"] for own, base in pairs]
        ratios = [own["max_vio_global"] / base["max_vio_global"] for own, base in pairs]
        error = statistics.stdev(losses) / math.sqrt(len(losses))
        cells = [f"{len(pairs)}", f"{statistics.fmean(losses):+.4f} ± {error:.4f}", f"{sum(d < 0 for d in losses)}"]
        cells += [f"{statistics.geometric_mean(ratios):.2f}", f"{sum(ratio < 1 for ratio in ratios)}"]
        made.append([method.label, *cells])
    return markdown(heading, made)


# ---------------------------------------------------------------------- fine-tuning


def bases_table(plan: Plan, results: Results) -> str:
    """The bases as they are: loss / score on each task; loss, MaxVio and domain information on their own text."""
    tasks, made = list(plan.axes["tasks"]), []
    way = next(iter(plan.axes["ways"]))
    for base in plan.axes["bases"]:
        runs = (plan.run(plan.methods[0], (base, task, way), plan.seeds[0]).reference for task in tasks)
        records = [results.get(run) for run in runs]
        figures = [record["metrics"] if record else {} for record in records]
        own = next(filter(None, figures), None)
        if own:
            cells = [f"{own['base_loss']:.3f}", f"{own['base_max_vio']:.2f}", f"{own['domain_information']:.3f}"]
            made.append([base, *map(_loss_and_score, figures), *cells])
    return markdown(["base", *tasks, "own text: loss", "MaxVio", "information, bits"], made)


def _loss_and_score(figures: Figures) -> str:
    if not figures:
        return NONE
    return f"{figures['loss']:.3f}" + (f" / {figures['score']:.0%}" if "score" in figures else "")


def way_table(plan: Plan, found: Cells) -> str:
    """Each method against the baseline over all bases, tasks and seeds."""
    heading = [f"against {plan.baseline}", "pairs", "loss", "lower", "score", "forgotten"]
    made = []
    for method in plan.methods:
        pairs = pairs_of(found, method.label, plan.baseline)
        if not pairs:
            continue
        if method.label == plan.baseline:
            cells = ["", "", show_mean(pairs, "score", ".1%"), show_mean(pairs, "forgotten", ".3f")]
        else:
            lower = sum(own["loss"] < base["loss"] for own, base in pairs)
            cells = [show_difference(pairs, "loss", ".4f"), f"{lower}"]
            cells += [show_difference(pairs, "score", ".1%"), show_difference(pairs, "forgotten", ".3f")]
        cells += [show_mean(pairs, "max_vio_global", ".2f"), show_mean(pairs, "base_max_vio", ".2f")]
        made.append([method.label, f"{len(pairs)}", *cells, show_mean(pairs, "rerouted", ".1%")])
    return markdown([*heading, "MaxVio, task", "MaxVio, own text", "rerouted"], made)


def parts_table(plan: Plan, found: Cells, part: int) -> str:
    """Loss / score of each method by `part` of the cell; differences for all but the baseline."""
    names = list(dict.fromkeys(cell[part] for cell in found))
    made = []
    for method in plan.methods:
        cells = []
        is_baseline = method.label == plan.baseline
        write, form = (show_mean, ".0%") if is_baseline else (show_difference, ".1%")
        for name in names:
            pairs = pairs_of(found, method.label, plan.baseline, lambda cell, name=name: cell[part] == name)
            scores = [write(pairs, "score", form)] * any("score" in own for own, _ in pairs)
            cells.append(" / ".join([write(pairs, "loss", ".3f"), *scores]))
        made.append([method.label, *cells])
    return markdown(["method", *names], made)


def versus_table(found: Cells, label: str, other: str) -> str:
    """Two methods against each other, by base and over all. Empty without runs of both."""
    heading = [f"{label} against {other}", "pairs", "loss", "lower", "forgotten", "less", "MaxVio, task, times"]
    made = []
    for name in [*dict.fromkeys(base for base, _, _ in found), "all"]:
        some = {cell: rows for cell, rows in found.items() if name in (cell[0], "all") and {label, other} <= set(rows)}
        pairs = pairs_of(some, label, other)
        if pairs:
            cells = [name, f"{len(pairs)}"]
            for figure, form in (("loss", ".4f"), ("forgotten", ".3f")):
                cells += [show_difference(pairs, figure, form), f"{sum(own[figure] < b[figure] for own, b in pairs)}"]
            ratios = [own["max_vio_global"] / base["max_vio_global"] for own, base in pairs]
            made.append([*cells, f"{statistics.geometric_mean(ratios):.2f}"])
    return markdown(heading, made) if made else ""


def along_table(plan: Plan, found: Cells, figure: str, reference: str) -> str:
    """
    Families of methods against the family `reference` at the same MaxVio, by base and over all. Empty without it.

    The curve of `reference` is a monotone cubic in log MaxVio (PCHIP; chords would lie above a convex curve) through its runs of a base and
    seed, and that of the baseline. A pair is the mean over a family's runs of a base and seed and the mean of the curve at their MaxVio. Runs
    beyond either end of the curve are left out.
    """
    labels = {m.family: [n.label for n in plan.methods if n.family == m.family] for m in plan.methods}
    if reference not in labels:
        return ""
    curve = [plan.baseline, *labels.pop(reference)]
    bases = list(dict.fromkeys(base for base, _, _ in found))
    made = []
    for family in labels:
        cells = []
        for name in (*bases, "all"):
            parts = (
                _on_curve(rows, seed, labels[family], curve, figure)
                for (base, *_), rows in found.items()
                if name in (base, "all")
                for seed in plan.seeds
            )
            pairs = list(filter(None, parts))
            lower = sum(own[figure] < other[figure] for own, other in pairs)
            cells.append(f"{show_difference(pairs, figure, '.4f')}, {lower} of {len(pairs)}" if pairs else NONE)
        made += [[family, *cells]] * (family != plan.baseline)
    return markdown([f"{figure}, against {reference} at its MaxVio; lower", *bases, "all"], made)


def _on_curve(
    rows: Mapping[str, Mapping[int, Figures]], seed: int, labels: Sequence[str], curve: Sequence[str], figure: str
) -> tuple[Figures, Figures] | None:
    """Returns the means of `figure` over runs of `labels` and, at their MaxVio, over the curve through those of `curve`."""
    if not all(rows[label].get(seed) for label in curve):
        return None
    points, runs = (
        sorted((math.log(run["max_vio_global"]), run[figure]) for label in some if (run := rows[label].get(seed)))
        for some in (curve, labels)
    )
    inside = [run for run in runs if points[0][0] <= run[0] <= points[-1][0]]
    if not inside:
        return None
    x, y = zip(*inside)
    return {figure: statistics.fmean(y)}, {figure: float(PchipInterpolator(*zip(*points))(x).mean())}


def first_table(plan: Plan, found: Cells) -> str:
    """The first steps: means over all bases, tasks and seeds."""
    columns = {
        "first_loss": ("loss", ".3f"),
        "first_gradient_norm": ("gradient norm", ".3f"),
        "first_gradient_norm_max": ("its maximum", ".2f"),
        "first_max_vio": ("MaxVio, batch", ".2f"),
        "rerouted_first": ("rerouted by then", ".1%"),
        "rerouted": ("rerouted in the end", ".1%"),
        "forgotten": ("forgotten in the end", ".3f"),
    }
    made = []
    for method in plan.methods:
        pairs = pairs_of(found, method.label, plan.baseline)
        if pairs:
            cells = (show_mean(pairs, name, form) for name, (_, form) in columns.items())
            made.append([method.label, f"{len(pairs)}", *cells])
    return markdown(["method", "runs", *(heading for heading, _ in columns.values())], made)
