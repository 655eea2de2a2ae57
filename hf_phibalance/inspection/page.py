"""An [`Inspection`] for people: tables in the terminal, and one HTML file that needs nothing beside itself.

The pictures are inline SVG whose colours are CSS variables, so that they follow the reader's light or dark theme; a few
lines of script show the value under the pointer. Tables need rich.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..maths.metrics import DEAD_THRESHOLD, relative_load
from ..publishing.report import _short, versions, without_paths
from .census import FIGURES, Inspection, lift, specialisation_figures


TEMPLATE = Path(__file__).with_name("page.html.jinja")
STEPS = 8  # colours on each side of the neutral one
LOAD_RANGE = 2.0  # powers of two from the neutral colour to the last one, for loads
LIFT_RANGE = 1.0  # and for preferences of a domain
NUMBERED = 16  # so many experts have their values written into the cells
FEWEST = 5.0  # a cell of a domain is shown only if so many tokens were to be expected in it
OPEN_LAYERS = 8  # domain-by-expert pictures that are not folded away
HEADINGS = {
    "max_vio": "MaxVio",
    "gini": "Gini",
    "cv": "CV",
    "normalised_entropy": "entropy",
    "dead_experts": "dead",
    "top1_probability": "top-1",
    "chosen_probability": "chosen",
    "entropy_bits": "H(p)",
}
IN_TERMINAL = [name for name in HEADINGS if name != "chosen_probability"]  # as many as fit into 80 columns


def layer_labels(names: Sequence[str]) -> list[str]:
    """Short names of layers, `layer 3`, as far as they stay apart."""
    short = [_short(name) for name in names]
    seen = Counter(short)
    return [name if seen[label] > 1 else label for name, label in zip(names, short)]


def figure_text(figures: Mapping[str, Any], name: str) -> tuple[str, bool]:
    """A figure as it is shown, and whether it is within what chance gives: then a `≈` stands before it."""
    noise = bool(figures.get("noise", {}).get(name, False))
    if name == "dead_experts":
        noise = noise and bool(figures[name])
        return f"{'≈' if noise else ''}{figures[name]}", noise
    return f"{'≈' if noise else ''}{figures[name]:.3f}", noise


def information_text(figures: Mapping[str, Any]) -> tuple[str, bool]:
    """The mutual information of [`specialisation_figures`] as it is shown, and whether it is noise."""
    return f"{'≈' if figures['noise'] else ''}{figures['mutual_information']:.4f}", bool(figures["noise"])


# ---------------------------------------------------------------------- terminal


def print_inspection(inspection: Inspection, console: Any, top: int = 5) -> None:
    """
    Prints what was found.

    Args:
        inspection (`Inspection`): What was found.
        console ([`rich.console.Console`]): Where to.
        top (`int`, *optional*, defaults to `5`): Specialists of each domain.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def cell(text: str, noise: bool = False) -> Text:
        return Text(text, style="dim" if noise else "")

    def make_table(heading: str, *columns: str) -> Table:
        table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        return table

    labels = layer_labels([layer.name for layer in inspection.layers])
    several = len(inspection.scopes()) > 1
    model = inspection.model
    console.print(Text(title(model), style="bold"))
    console.print(Text(describe(model)), highlight=False)
    headings = [HEADINGS[name] for name in IN_TERMINAL]
    table = make_table("Means over layers", "texts", "tokens", *headings, "noise")
    for scope in inspection.scopes():
        summary = inspection.summary(scope)
        table.add_row(
            Text(scope if several else next(iter(inspection.domains))),
            f"{summary['tokens']:,}",
            *(cell(f"{summary[n]}" if n == "dead_experts" else f"{summary[n]:.3f}") for n in IN_TERMINAL),
            f"{summary['noise_floor_in_text']:.3f}",
        )
    console.print(table)

    table = make_table(
        "Layers, all texts" if several else "Layers", "layer", *headings, "noise", *(["I"] if several else [])
    )
    for label, layer in zip(labels, inspection.layers):
        figures = inspection.layer_figures(layer)["overall"]
        row = [Text(label), *(cell(*figure_text(figures, name)) for name in IN_TERMINAL)]
        row.append(cell(f"{figures['chance_in_text']['max_vio']:.3f}"))
        if several:
            row.append(cell(*information_text(specialisation_figures(layer.halves, layer.top_k))))
        table.add_row(*row)
    console.print(table)

    console.print(Text("Load of each expert: ▄ is the fair share, × under a twentieth of it", style="italic"))
    width = max(map(len, labels))
    for label, layer in zip(labels, inspection.layers):
        strip = load_strip(relative_load(inspection.counts(layer, "overall").double()).tolist())
        room = max(console.width - width - 1, 8)
        for start in range(0, len(strip), room):
            console.print(Text(f"{'' if start else label:<{width}} ") + strip[start : start + room])

    if several:
        table = make_table(
            "Experts that a domain uses most beyond what the others do",
            *("domain", "layer", "expert", "tokens choosing it", "in other domains", "lift"),
        )
        by_name = dict(zip([layer.name for layer in inspection.layers], labels))
        for domain in inspection.domains:
            entries = inspection.specialists(domain, top)
            for entry in entries:
                table.add_row(
                    Text(domain),
                    by_name[entry["layer"]],
                    str(entry["expert"]),
                    f"{entry['share']:.1%}",
                    f"{entry['share_elsewhere']:.1%}",
                    f"{entry['lift']:.2f}×",
                )
            if not entries:
                table.add_row(Text(domain), "none", "", "", "", "", style="dim")
        console.print(table)
    console.print(
        "≈ no further from balance, or no larger, than chance explains; noise: MaxVio that chance alone gives"
        + ("; I: mutual information of domain and expert, bits" if several else ""),
        style="dim",
        highlight=False,
    )
    for note in inspection.notes:
        console.print(Text(f"Note: {note}"), style="yellow")


def load_strip(relative: Sequence[float]) -> Any:
    """One character for the relative load of each expert, as [`rich.text.Text`]."""
    from rich.text import Text

    strip = Text()
    for value in relative:
        if value < DEAD_THRESHOLD:
            strip.append("×", style="magenta")
        else:
            level = min(int(value * 4), 8)  # eighths of twice the fair share
            strip.append(" ▁▂▃▄▅▆▇█"[max(level, 1)], style="red" if value >= 2 else "blue" if value <= 0.5 else "")
    return strip


def title(model: Mapping[str, Any]) -> str:
    """Name of a model, without the folder it lies in."""
    name = str(model["name"])
    return Path(name).resolve().name if Path(name).exists() else name


def describe(model: Mapping[str, Any]) -> str:
    """A model in one line."""

    def many(values: Sequence[int]) -> str:
        return " or ".join(map(str, values))

    count = model["parameters"]
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    return (
        f"{model['model_type']}, {size} parameters in {model['dtype']}, {model['routers']} routers of "
        f"{many(model['experts'])} experts, top-{many(model['top_k'])}; selection bias: {model['selection_bias']}"
    )


# ---------------------------------------------------------------------- pictures


def colour_steps(dark: bool) -> dict[int, str]:
    """The diverging colours from `-STEPS` (idle) over 0 (fair share) to `STEPS` (crowded), as hex codes."""
    ends = ((88, 166, 255), (43, 48, 56), (255, 123, 84)) if dark else ((23, 92, 168), (240, 241, 243), (190, 38, 32))
    colours = {}
    for step in range(-STEPS, STEPS + 1):
        share, end = (abs(step) / STEPS) ** 0.85, ends[0] if step < 0 else ends[2]
        mixed = [round(middle + share * (last - middle)) for middle, last in zip(ends[1], end)]
        colours[step] = "#{:02x}{:02x}{:02x}".format(*mixed)
    return colours


def colour_step(value: float, reach: float = LOAD_RANGE) -> int:
    """Step of the colours for a value relative to what is fair: powers of two, `2**reach` being the last."""
    return -STEPS if value <= 0 else round(max(-1.0, min(1.0, math.log2(value) / reach)) * STEPS)


def _class(step: int) -> str:
    return f"h{step + STEPS}"


def heat_svg(
    rows: Sequence[Sequence[float | None]],
    labels: Sequence[str],
    what: str,
    reach: float = LOAD_RANGE,
    cross_dead: bool = False,
    caption: str = "",
) -> str:
    """
    A heat map as inline SVG: one row per label, one column per expert.

    Args:
        rows (`Sequence[Sequence[float | None]]`): Values relative to 1, which is neutral; `None` is left blank. Rows may be
            of unequal length.
        labels (`Sequence[str]`): Names of the rows.
        what (`str`): What the values are, for the text under the pointer.
        reach (`float`, *optional*, defaults to `2.0`): Powers of two from the neutral colour to the last one.
        cross_dead (`bool`, *optional*, defaults to `False`): Whether dead experts are crossed out.
        caption (`str`, *optional*): Description for those who cannot see it.
    """
    columns = max(map(len, rows))
    numbered = columns <= NUMBERED
    width, height = 38.0 if numbered else max(5.0, min(22.0, 880 / columns)), 22 if numbered else 16
    left = 12 + 6.6 * max(map(len, labels))
    cells: dict[str, list[str]] = {}
    crosses, numbers = [], []
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            step = 0 if value is None else colour_step(value, reach)
            cells.setdefault("blank" if value is None else _class(step), []).append(f"M{x} {y}h1v1h-1z")
            if numbered and value is not None:
                place = f'x="{left + (x + 0.5) * width:.1f}" y="{(y + 0.5) * height + 4:.1f}"'
                numbers.append(
                    f'<text {place} class="mid {"on" if abs(step) > STEPS / 2 else "in"}">{value:.2f}</text>'
                )
            if cross_dead and value is not None and value < DEAD_THRESHOLD:
                crosses.append(f"M{x + 0.25:g} {y + 0.2:g}l.5 .6m0-.6l-.5 .6")
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if step * width >= 24)
    parts = [
        f'<svg class="heat" role="img" aria-label="{escape(caption or what)}" '
        f'viewBox="0 0 {left + columns * width + 4:.1f} {len(rows) * height + 20}" '
        f'style="width:{left + columns * width + 4:.0f}px" data-left="{left:.1f}" data-w="{width:.4f}" '
        f'data-h="{height}" data-what="{escape(what)}" data-labels="{escape(json.dumps(list(labels)))}" '
        f'data-rows="{escape(json.dumps([[None if v is None else round(v, 3) for v in row] for row in rows]))}">'
    ]
    for y, label in enumerate(labels):
        parts.append(f'<text x="{left - 6:.1f}" y="{(y + 0.5) * height + 4:.1f}" class="end">{escape(label)}</text>')
    for x in range(0, columns, every):
        parts.append(f'<text x="{left + (x + 0.5) * width:.1f}" y="{len(rows) * height + 14}" class="mid">{x}</text>')
    parts.append(f'<g transform="translate({left:.1f} 0) scale({width:.4f} {height})">')
    parts += [f'<path class="{name}" d="{"".join(d)}"/>' for name, d in sorted(cells.items())]
    if crosses:
        parts.append(f'<path class="cross" d="{"".join(crosses)}"/>')
    return "".join([*parts, "</g>", *numbers, "</svg>"])


def legend_svg(least: str, less: str, more: str, most: str) -> str:
    """The colours of the heat maps with the values of the ends and of half the way there."""
    parts = ['<svg class="legend" viewBox="0 0 270 30" style="width:270px" role="img" aria-label="colour scale">']
    width = 230 / (2 * STEPS + 1)
    for step in range(-STEPS, STEPS + 1):
        x = 20 + (step + STEPS) * width
        parts.append(f'<rect class="{_class(step)}" x="{x:.1f}" y="0" width="{width + 0.3:.1f}" height="12"/>')
    for text, place in ((least, -STEPS), (less, -STEPS / 2), ("1×", 0), (more, STEPS / 2), (most, STEPS)):
        parts.append(f'<text class="mid" x="{20 + (place + STEPS + 0.5) * width:.1f}" y="26">{text}</text>')
    return "".join([*parts, "</svg>"])


def lines_svg(
    series: Mapping[str, Sequence[float]], labels: Sequence[str], what: str, dashed: str | None = None
) -> str:
    """
    Lines over the layers as inline SVG, with a legend.

    Args:
        series (`Mapping[str, Sequence[float]]`): Values of each layer by the name of the line.
        labels (`Sequence[str]`): Names of the layers.
        what (`str`): What the values are.
        dashed (`str`, *optional*): Name of the line that is a bound, drawn dashed.
    """
    left, right, top, height = 52, 150, 26, 190
    count = len(labels)
    width = min(640, max(220, 46 * count))
    ticks = nice_ticks(max(max(values) for values in series.values()))

    def place(index: int, value: float) -> tuple[float, float]:
        x = left + (width * (index + 0.5) / count)
        return round(x, 1), round(top + height * (1 - value / ticks[-1]), 1)

    parts = [
        f'<svg class="lines" role="img" aria-label="{escape(what)}" viewBox="0 0 {left + width + right} {top + height + 36}" '
        f'style="width:{left + width + right}px"><text x="{left - 6}" y="13" class="head">{escape(what)}</text>'
    ]
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(
            f'<path class="grid" d="M{left} {y}h{width}"/><text x="{left - 7}" y="{y + 4}" class="end">{tick:g}</text>'
        )
    every = max(1, math.ceil(count * 44 / width))
    for index in range(0, count, every):
        text = labels[index].removeprefix("layer ") if every > 1 or count > 12 else labels[index]
        parts.append(f'<text x="{place(index, 0)[0]}" y="{top + height + 16}" class="mid">{escape(text)}</text>')
    for number, (name, values) in enumerate(series.items()):
        kind = "bound" if name == dashed else f"s{number % 8}"
        points = [place(index, value) for index, value in enumerate(values)]
        parts.append(f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>')
        if name != dashed:
            parts += [
                f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"><title>{escape(f"{name}, {label}: {value:.4f}")}</title></circle>'
                for (x, y), label, value in zip(points, labels, values)
            ]
        y = top + 8 + 18 * number
        parts.append(
            f'<path class="{kind} key" d="M{left + width + 14} {y}h20"/><text x="{left + width + 40}" y="{y + 4}">{escape(name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def nice_ticks(highest: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least `highest`."""
    if not highest > 0:
        return [0.0, 1.0]
    rough = highest / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [round(index * step, 12) for index in range(math.ceil(highest / step - 1e-9) + 1)]


# ---------------------------------------------------------------------- the page


def html_report(inspection: Inspection, top: int = 10, command: Sequence[str] | None = None) -> str:
    """
    The page of an inspection.

    Args:
        inspection (`Inspection`): What was found.
        top (`int`, *optional*, defaults to `10`): Specialists of each domain.
        command (`Sequence[str]`, *optional*): The command line behind it.

    Returns:
        `str`: HTML that refers to nothing outside itself.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["svg"] = jinja2.utils.markupsafe.Markup
    layers, scopes = inspection.layers, inspection.scopes()
    labels = layer_labels([layer.name for layer in layers])
    several = len(scopes) > 1
    figures = [inspection.layer_figures(layer) for layer in layers]
    summaries = {scope: inspection.summary(scope) for scope in scopes}
    information = [specialisation_figures(layer.halves, layer.top_k) for layer in layers] if several else []
    most = sorted(range(len(information)), key=lambda i: -information[i]["mutual_information"])[:OPEN_LAYERS]

    def loads(scope: str) -> str:
        rows = [relative_load(inspection.counts(layer, scope).double()).tolist() for layer in layers]
        return heat_svg(rows, labels, "× the fair share", cross_dead=True, caption=f"load of each expert, {scope}")

    def over_layers(name: str, what: str, floor: bool = False) -> str:
        series = {scope: [figure[scope][name] for figure in figures] for scope in scopes}
        if floor:
            series["noise floor"] = [
                max(figure[scope]["chance_in_text"][name] for scope in scopes) for figure in figures
            ]
        return lines_svg(series, labels, what, "noise floor")

    def table(scope: str) -> list[dict[str, Any]]:
        return [
            {
                "label": label,
                "name": layer.name,
                "experts": layer.experts,
                "top_k": layer.top_k,
                "cells": [figure_text(figure[scope], name) for name in HEADINGS],
                "dead": figure[scope]["dead"],
                "extremes": (figure[scope]["min_relative_load"], figure[scope]["max_relative_load"]),
                "floor": figure[scope]["chance_in_text"]["max_vio"],
                "effect": figure[scope]["design_effect"],
            }
            for label, layer, figure in zip(labels, layers, figures)
        ]

    pictures = {
        "loads": {scope: loads(scope) for scope in scopes},
        "max_vio": over_layers("max_vio", "MaxVio", floor=True),
        "confidence": over_layers("top1_probability", "mean probability of the first choice"),
        "entropy": over_layers("entropy_bits", "mean entropy of the probabilities of a token, bits"),
        "information": lines_svg(
            {
                "I(domain; expert)": [entry["mutual_information"] for entry in information],
                "bias removed": [entry["bias"] for entry in information],
            },
            labels,
            "mutual information of domain and expert, bits",
            "bias removed",
        )
        if several
        else "",
        "domains": [domain_heat(inspection, index, labels[index]) for index in range(len(layers))] if several else [],
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title(inspection.model),
        description=describe(inspection.model),
        inspection=inspection,
        several=several,
        scopes=scopes,
        scope_names={scope: scope if several else next(iter(inspection.domains)) for scope in scopes},
        summaries=summaries,
        headings=HEADINGS,
        tables={scope: table(scope) for scope in scopes},
        figures_names=FIGURES,
        labels=labels,
        by_name=dict(zip([layer.name for layer in layers], labels)),
        information=[(*information_text(entry), entry) for entry in information],
        mean_information=sum(entry["mutual_information"] for entry in information) / len(information)
        if several
        else None,
        most=sorted(most),
        rest=[index for index in range(len(layers)) if index not in most],
        specialists={name: inspection.specialists(name, top) for name in inspection.domains} if several else {},
        pictures=pictures,
        legend_loads=legend_svg("≤ ¼×", "½×", "2×", "≥ 4×"),
        legend_lift=legend_svg("≤ ½×", "0.71×", "1.41×", "≥ 2×"),
        colours={"light": colour_steps(dark=False), "dark": colour_steps(dark=True)},
        offset=STEPS,
        command=command and without_paths([_without_folder(word) for word in command]),
        versions={name: versions()[name] for name in ("hf_phibalance", "torch", "transformers") if name in versions()},
    )


def _without_folder(word: str) -> str:
    """`name=/a/b` as `name=b`: where files lie on one machine helps nobody else."""
    name, equals, path = word.partition("=")
    return f"{name}={Path(path).name}" if equals and Path(path).is_absolute() else word


def domain_heat(inspection: Inspection, index: int, label: str) -> str:
    """Which experts each domain prefers in layer number `index`: share in the domain over share in all."""
    counts_DE = inspection.layers[index].counts.double()
    expected_DE = counts_DE.sum(1, keepdim=True) * counts_DE.sum(0) / counts_DE.sum()
    rows: list[list[float | None]] = [
        [value if expected >= FEWEST else None for value, expected in zip(row, expected_row)]
        for row, expected_row in zip(lift(counts_DE).tolist(), expected_DE.tolist())
    ]
    names = list(inspection.domains)
    return heat_svg(rows, names, "× its share over all texts", reach=LIFT_RANGE, caption=f"preferences, {label}")
