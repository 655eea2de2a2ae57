"""Tables of finished fine-tuning, in Markdown: differences to a baseline, paired by base, task, way and seed."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..paired import is_told, mean_spread, spread_of
from ..plain import plain_table
from ..records import Results
from .finished import Cell, Figures, finished, pairs, untouched
from .plans import Plan


def write_tables(plan: Plan, results: Results, output: Path) -> list[Path]:
    """`<output>/<plan>.md`, if any run of the plan is finished."""
    found = finished(plan, results)
    if not found:
        return []
    parts = [f"# {plan.question or plan.name}", NOTE.format(plan=plan), bases_table(plan, results)]
    for way in dict.fromkeys(way for _, _, way in found):
        parts += [
            f"## {way}",
            way_table(plan, found, way),
            parts_table(plan, found, way, "tasks"),
            parts_table(plan, found, way, "bases"),
        ]
    if plan.portable:
        parts += ["## Served plainly", plain_table(found)]
    for cell in found:
        title = f"<details><summary>{', '.join(cell)}</summary>"
        parts.append(f"{title}\n\n{cell_table(plan, found, cell)}\n\n</details>")
    path = output / f"{plan.name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [path]


NOTE = (
    "{plan.steps} steps of about {plan.tokens} tokens. Differences to `{plan.baseline}` are paired by base, task, way and "
    "seed; mean ± standard error, `*` where a t-test at 5 % tells them from 0, as if all pairs were independent. *Forgotten*: growth of the loss on the text "
    "of the bases. *Score*: exact match, or pass@1 of functions."
)


def refresh(text: str, plans: Sequence[Plan], results: Results) -> str:
    """
    `text` with its marked tables made anew: `<!-- table: plan; bases -->` ... `<!-- /table -->` are the bases as they were,
    `plan; plain` what is left without a selection bias, `plan; way` all tasks and bases together, `plan; way; tasks` and
    `plan; way; bases` each task or base, `plan; way; first` the first steps, `plan; way; A against B` two methods, and
    `plan; base; task; way` one cell.

    Raises:
        ValueError: if a mark names a plan, or runs, of which nothing is finished.
    """
    by_name = {plan.name: plan for plan in plans}

    def renew(mark: re.Match) -> str:
        of, named, end = mark.groups()
        name, *at = named.split("; ")
        plan = by_name.get(name)
        found = finished(plan, results) if plan else {}
        ways = {way for _, _, way in found}
        match at:
            case ["bases"] if plan and found:
                made = bases_table(plan, results)
            case ["plain"] if plan and found:
                made = plain_table(found)
            case [way] if plan and way in ways:
                made = way_table(plan, found, way)
            case [way, "tasks" | "bases" as parts] if plan and way in ways:
                made = parts_table(plan, found, way, parts)
            case [way, "first"] if plan and way in ways:
                made = first_table(plan, found, way)
            case [way, versus] if plan and way in ways and " against " in versus:
                made = versus_table(plan, found, way, *versus.split(" against "))
            case [base, task, way] if plan and (base, task, way) in found:
                made = cell_table(plan, found, (base, task, way))
            case _:
                raise ValueError(f"the mark '{of.strip()}' asks for runs of which none is finished, or no such plan.")
        return f"{of}{made}\n{end}"

    return re.sub(r"(<!-- table: ([^>]+) -->\n).*?(<!-- /table -->)", renew, text, flags=re.DOTALL)


def bases_table(plan: Plan, results: Results) -> str:
    """The bases as they were: loss / score on each task, loss and MaxVio on their own text."""
    before = untouched(plan, results)
    lines = ["| base | " + " | ".join(plan.tasks) + " | own text: loss | MaxVio | information, bits |"]
    lines.append("|---|" + "---:|" * (len(plan.tasks) + 3))
    for base in plan.bases:
        at = {task: before[base.name, task] for task in plan.tasks if (base.name, task) in before}
        if not at:
            continue
        cells = [_loss_and_score(at[task]) if task in at else "–" for task in plan.tasks]
        own = next(iter(at.values()))
        cells += [f"{own['base_loss']:.3f}", f"{own['base_max_vio']:.2f}", f"{own['domain_information']:.3f}"]
        lines.append(f"| {base.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _loss_and_score(figures: Figures) -> str:
    return f"{figures['loss']:.3f}" + (f" / {figures['score']:.0%}" if "score" in figures else "")


def way_table(plan: Plan, found: Mapping[Cell, Mapping], way: str) -> str:
    """Each method against the baseline over all bases, tasks and seeds of one way."""
    heading = "| against {} | pairs | loss | lower | score | forgotten | MaxVio, task | MaxVio, own text | rerouted |"
    lines = [heading.format(plan.baseline), "|---|" + "---:|" * 8]
    for method in plan.methods:
        some = list(pairs(found, method.label, plan.baseline, lambda cell: cell[2] == way))
        if not some:
            continue
        is_baseline = method.label == plan.baseline
        cells = [
            f"{len(some)}",
            "" if is_baseline else _difference(some, "loss", ".4f"),
            "" if is_baseline else f"{sum(own['loss'] < base['loss'] for own, base in some)}",
            *(
                _mean(some, name, form) if is_baseline else _difference(some, name, form)
                for name, form in (("score", ".1%"), ("forgotten", ".3f"))
            ),
            *(
                _mean(some, name, form)
                for name, form in (("max_vio_global", ".2f"), ("base_max_vio", ".2f"), ("rerouted", ".1%"))
            ),
        ]
        lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table(plan: Plan, found: Mapping[Cell, Mapping], way: str, parts: str) -> str:
    """
    Loss and score of each method on each of the `parts`, `"tasks"` or `"bases"`, over all seeds and the rest of one way;
    differences for all but the baseline.
    """
    index = ("bases", "tasks").index(parts)
    names = list(dict.fromkeys(cell[index] for cell in found if cell[2] == way))
    lines = ["| method | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for method in plan.methods:
        cells = []
        for name in names:
            some = list(
                pairs(found, method.label, plan.baseline, lambda cell, at=name: (cell[index], cell[2]) == (at, way))
            )
            scored = any("score" in own for own, _ in some)
            write = _mean if method.label == plan.baseline else _difference
            said = [write(some, "loss", ".3f"), *([write(some, "score", ".0%" if write is _mean else ".1%")] * scored)]
            cells.append(" / ".join(said))
        if set(cells) != {"–"}:
            lines.append(f"| {method.label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versus_table(plan: Plan, found: Mapping[Cell, Mapping], way: str, label: str, other: str) -> str:
    """
    Two methods against each other, by base and over all.

    Raises:
        ValueError: if there are no runs of both.
    """
    lines = [f"| {label} against {other} | pairs | loss | lower | forgotten | less | MaxVio, task, times |"]
    lines.append("|---|" + "---:|" * 6)
    bases = list(dict.fromkeys(base for base, _, at in found if at == way))
    for name, some_bases in (*((base, {base}) for base in bases), ("all", set(bases))):
        some = list(pairs(found, label, other, lambda cell, at=some_bases: cell[0] in at and cell[2] == way))
        if some:
            cells = [f"{len(some)}"]
            for figure, form in (("loss", ".4f"), ("forgotten", ".3f")):
                cells += [_difference(some, figure, form), f"{sum(own[figure] < base[figure] for own, base in some)}"]
            ratios = [own["max_vio_global"] / base["max_vio_global"] for own, base in some]
            lines.append(f"| {name} | " + " | ".join([*cells, f"{statistics.geometric_mean(ratios):.2f}"]) + " |")
    if len(lines) == 2:
        raise ValueError(f"plan {plan.name!r} has no finished runs of {label!r} beside those of {other!r}.")
    return "\n".join(lines)


FIRST_COLUMNS = (
    ("first_loss", "loss", ".3f"),
    ("first_gradient_norm", "gradient norm", ".3f"),
    ("first_gradient_norm_max", "its maximum", ".2f"),
    ("first_max_vio", "MaxVio, batch", ".2f"),
    ("rerouted_first", "rerouted by then", ".1%"),
    ("rerouted", "rerouted in the end", ".1%"),
    ("forgotten", "forgotten in the end", ".3f"),
)


def first_table(plan: Plan, found: Mapping[Cell, Mapping], way: str) -> str:
    """The first steps of each method over all bases, tasks and seeds of one way: means of those that have a partner."""
    lines = ["| method | runs | " + " | ".join(heading for _, heading, _ in FIRST_COLUMNS) + " |"]
    lines.append("|---|" + "---:|" * (len(FIRST_COLUMNS) + 1))
    for method in plan.methods:
        some = list(pairs(found, method.label, plan.baseline, lambda cell: cell[2] == way))
        if some:
            cells = [_mean(some, name, form) for name, _, form in FIRST_COLUMNS]
            lines.append(f"| {method.label} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


CELL_COLUMNS = (
    ("loss", "loss", ".3f"),
    ("score", "score", ".1%"),
    ("forgotten", "forgotten", ".3f"),
    ("max_vio_global", "MaxVio, task", ".2f"),
    ("base_max_vio", "MaxVio, own text", ".2f"),
    ("max_vio_train_batch", "MaxVio, batch", ".2f"),
    ("rerouted", "rerouted", ".1%"),
    ("domain_information", "information, bits", ".3f"),
)


def cell_table(plan: Plan, found: Mapping[Cell, Mapping], cell: Cell) -> str:
    """All figures of one base, task and way: mean ± standard deviation over the seeds."""
    columns = [
        column for column in CELL_COLUMNS if any(column[0] in f for row in found[cell].values() for f in row.values())
    ]
    lines = ["| method | n | " + " | ".join(heading for _, heading, _ in columns) + " |"]
    lines.append("|---|" + "---:|" * (len(columns) + 1))
    for label, by_seed in found[cell].items():
        cells = [f"{len(by_seed)}"]
        for name, _, form in columns:
            cells.append(spread_of([figures[name] for figures in by_seed.values()], form))
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(some: Sequence[tuple[Figures, Figures]], name: str, form: str) -> str:
    """Mean over the runs that have the figure."""
    values = [own[name] for own, _ in some if name in own]
    return f"{statistics.fmean(values):{form}}" if values else "–"


def _difference(some: Sequence[tuple[Figures, Figures]], name: str, form: str) -> str:
    """Mean difference ± standard error, with a star where it can be told from 0."""
    differences = [own[name] - base[name] for own, base in some if name in own]
    if not differences:
        return "–"
    mean, spread = mean_spread(differences)
    if math.isnan(spread):
        return f"{mean:+{form}}"
    told = is_told(mean, spread, len(differences))
    return f"{mean:+{form}} ± {spread / math.sqrt(len(differences)):{form}}" + " *" * told
