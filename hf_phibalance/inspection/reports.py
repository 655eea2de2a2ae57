"""
An [`Inspection`], or a [`Comparison`] of two, as tables in the terminal, by rich, and as one HTML page, by Jinja. A [`Placement`] as
tables.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..files import layer_labels, printable, versions, without_paths
from ..maths import DEAD_THRESHOLD
from .comparing import Comparison
from .placing import Placement
from .results import Inspection, lift, specialisation_figures


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
IN_TERMINAL = [name for name in HEADINGS if name != "chosen_probability"]  # 80 columns hold no more
FIGURES_WIDTH = 70  # characters of the figures in a row of the terminal's tables
TEMPLATE = Path(__file__).with_name("page.html.jinja")
FEWEST = 5.0  # a lift is shown only from this many expected assignments
OPEN_LAYERS = 8  # number of layers whose domains are unfolded
EXAMPLE_BYTES = 1_500_000  # of the experts and weights of tokens in a page, before base64
DOMAINS_ABREAST = 6  # in a table of the terminal


def print_inspection(inspection: Inspection, console: Console, top: int = 5) -> None:
    """Prints tables of an inspection to a rich console, with at most `top` specialists of each domain."""
    labels = layer_labels([layer.name for layer in inspection.layers])
    several = len(inspection.scopes()) > 1
    console.print(Text(_title(inspection), style="bold"))
    console.print(Text(_description(inspection)), highlight=False)
    headings = [HEADINGS[name] for name in IN_TERMINAL]

    table = _table(console, "Means over layers", "texts", "tokens", *headings, "noise")
    for scope in inspection.scopes():
        figures = inspection.summary(scope)
        name = scope if several else next(iter(inspection.domains))
        cells = [_marked(figures, name) for name in IN_TERMINAL]
        table.add_row(Text(name), f"{figures['tokens']:,}", *cells, f"{figures['noise_floor_in_text']:.3f}")
    console.print(table)

    information = ["I"] if several else []
    table = _table(console, "Layers, all texts" if several else "Layers", "layer", *headings, "noise", *information)
    for label, layer in zip(labels, inspection.layers):
        figures = inspection.layer_figures(layer)["overall"]
        row = [_dimmed(_marked(figures, name)) for name in IN_TERMINAL]
        row.append(Text(f"{figures['chance_in_text']['max_vio']:.3f}"))
        if several:
            row.append(_dimmed(_marked(specialisation_figures(layer.halves, layer.top_k), "mutual_information")))
        table.add_row(Text(label), *row)
    console.print(table)

    _print_loads(
        console, [(label, inspection.loads(layer, "overall")) for label, layer in zip(labels, inspection.layers)]
    )

    if several:
        columns = ("domain", "layer", "expert", "tokens choosing it", "in other domains", "lift")
        table = _table(console, "Experts that a domain uses more than the others do", *columns)
        by_name = dict(zip([layer.name for layer in inspection.layers], labels))
        for domain in inspection.domains:
            entries = inspection.specialists(domain, top)
            for entry in entries:
                shares = (f"{entry['share']:.1%}", f"{entry['share_elsewhere']:.1%}", f"{entry['lift']:.2f}×")
                table.add_row(Text(domain), Text(by_name[entry["layer"]]), str(entry["expert"]), *shares)
            if not entries:
                table.add_row(Text(domain), "none", "", "", "", "", style="dim")
        console.print(table)
    key = "≈ chance explains it; noise: MaxVio from chance alone"
    key += "; I: mutual information of domain and expert, bits" if several else ""
    console.print(key, style="dim", highlight=False)
    console.print(_cutting(inspection), style="dim", highlight=False)
    for note in inspection.notes:
        console.print(Text(f"Note: {note}"), style="yellow")


def print_comparison(comparison: Comparison, console: Console, top: int = 5) -> None:
    """Prints tables of a comparison to a rich console, with at most `top` old and `top` new specialists of each domain."""
    before, after = comparison.before, comparison.after
    labels = layer_labels([layer.name for layer in before.layers])
    several, domains, layers = len(before.scopes()) > 1, list(before.domains), comparison.layer_figures
    console.print(Text(f"{_title(after)}, compared to {_title(before)}", style="bold"))
    for when, inspection in (("before", before), ("after", after)):
        console.print(Text(f"{when}: {_description(inspection)}"), highlight=False)

    headings = ("tokens", "differ", "unrelated", "load moved", "MaxVio", "after", "dead", "after")
    table = _table(console, "Means over layers", "texts", *headings)
    for scope in before.scopes():
        figures, name = comparison.summary(scope), scope if several else domains[0]
        cells = [f"{figures[key]:.1%}" for key in ("differ", "differ_if_unrelated", "load_moved")]
        for key, form in (("max_vio", ".3f"), ("dead_experts", "d")):
            cells += [f"{figures[when][key]:{form}}" for when in ("before", "after")]
        table.add_row(Text(name), f"{figures['tokens']:,}", *cells)
    console.print(table)

    table = _table(
        console, "Layers, all texts" if several else "Layers", "layer", "differ", "load moved", "MaxVio", "after"
    )
    for label, figures, *pair in zip(labels, layers, before.layers, after.layers):
        own = figures["overall"]
        max_vios = [
            _dimmed(_marked(side.layer_figures(layer)["overall"], "max_vio"))
            for side, layer in zip((before, after), pair)
        ]
        table.add_row(Text(label), f"{own['differ']:.1%}", _dimmed(_marked(own, "load_moved")), *max_vios)
    console.print(table)

    for start in range(0, len(domains) if several else 0, DOMAINS_ABREAST):
        abreast = domains[start : start + DOMAINS_ABREAST]
        table = _table(console, "Differ in", "layer", *abreast)
        for label, figures in zip(labels, layers):
            table.add_row(Text(label), *(f"{figures[domain]['differ']:.1%}" for domain in abreast))
        console.print(table)

    rows = []
    for label, *pair in zip(labels, before.layers, after.layers):
        for name, side, layer in zip((f"{label} before", f"{'':<{len(label)}} after"), (before, after), pair):
            rows.append((name, side.loads(layer, "overall")))
    _print_loads(console, rows)

    if several:
        columns = ("domain", "layer", "expert", "", "lift", "after", "change in use")
        table = _table(console, "What became of the experts that a domain uses more than the others do", *columns)
        by_name, fates = dict(zip([layer.name for layer in before.layers], labels)), []
        for domain in domains:
            found = comparison.specialists(domain, top)
            fates.append(f"{domain}: {found['before']} before, {found['still']} of them still, {found['new']} new.")
            for entry in found["experts"]:
                lifts = [_dimmed(_marked(entry[when], "lift")) for when in ("before", "after")]
                where = (Text(domain), Text(by_name[entry["layer"]]), str(entry["expert"]))
                table.add_row(*where, "new" if entry["is_new"] else "", *lifts, _dimmed(_marked(entry, "change")))
        console.print(table)
        console.print(Text("\n".join(fates)), highlight=False)
    key = "differ: choices that the other model does not make for the same token; unrelated: expected of unrelated choices"
    key += "; load moved: share of choices by which the loads differ; ≈ chance explains it"
    key += "; change in use: of the share of tokens, here less elsewhere" if several else ""
    console.print(key, style="dim", highlight=False)
    console.print(_cutting(after), style="dim", highlight=False)
    for note in dict.fromkeys([*before.notes, *after.notes]):
        console.print(Text(f"Note: {note}"), style="yellow")


def print_placement(placement: Placement, console: Console) -> None:
    """Prints tables of a placement to a rich console."""
    inspection, names = placement.inspection, ("linear", "placed", "least")
    labels = layer_labels([layer.name for layer in inspection.layers])
    console.print(Text(f"{_title(inspection)} on {placement.ranks} ranks", style="bold"))
    console.print(Text(_description(inspection)), highlight=False)
    console.print("Load of the busiest rank over the mean, 1 at best:", highlight=False)
    rows = [(scope, placement.summary(scope)) for scope in inspection.scopes()]
    layers = [(label, placement.layer_figures(index, "overall")) for index, label in enumerate(labels)]
    for heading, first, parts in (("Means over layers", "texts", rows), ("Layers, all texts", "layer", layers)):
        table = _table(console, heading, first, *names)
        for label, figures in parts:
            table.add_row(Text(label), *(f"{figures[name]:.3f}" for name in names))
        console.print(table)
    key = "Placed by the loads of every other sequence, measured on the rest. linear: in the order of the checkpoint; least: no placement "
    console.print(f"{key}that has each expert once can go below", style="dim", highlight=False)
    for note in inspection.notes:
        console.print(Text(f"Note: {note}"), style="yellow")


def html_report(
    found: Inspection | Comparison,
    top: int = 10,
    command: Sequence[str] | None = None,
    run: Mapping[str, Any] | None = None,
) -> str:
    """
    Returns an inspection or a comparison as one HTML page that loads nothing else. It follows the reader's light or dark theme.

    Args:
        found (`Inspection` or `Comparison`):
            The result of [`inspect_model`], or two of them, or the records of a training run. Of two models, the page describes the
            second, and what changed.
        top (`int`, *optional*, defaults to `10`): Longest list of specialists of a domain.
        command (`Sequence[str]`, *optional*): The command line to show. Folders are left out.
        run (`Mapping`, *optional*):
            The training run, if the domains are its stretches of steps: `description`, `versions`, `alerts`, and the lines of the
            pictures over its steps: `steps`, `max_vio`, `worst`, `floor`, `loss_steps` and `loss`.
    """
    comparison = found if isinstance(found, Comparison) else None
    inspection = found.after if isinstance(found, Comparison) else found
    overall, used = inspection.summary("overall"), run["versions"] if run else versions()
    layers, several = inspection.layers, len(inspection.domains) > 1
    information = [specialisation_figures(layer.halves, layer.top_k) for layer in layers] if several else []
    by_bits = sorted(range(len(information)), key=lambda index: -information[index]["mutual_information"])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(zip=zip, marked=_marked, shade=_shade)
    sides = {"after": inspection} if comparison is None else {"before": comparison.before, "after": inspection}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=_title(inspection),
        description=run["description"] if run else _description(inspection),
        cutting="" if run else _cutting(inspection),
        run=run,
        inspection=inspection,
        layers=layers,
        labels=layer_labels([layer.name for layer in layers]),
        several=several,
        scopes={scope: scope if several else next(iter(inspection.domains)) for scope in inspection.scopes()},
        summaries={scope: inspection.summary(scope) for scope in inspection.scopes()},
        figures=[inspection.layer_figures(layer) for layer in layers],
        figures_before=comparison and [comparison.before.layer_figures(layer) for layer in comparison.before.layers],
        loads={
            when: {scope: [side.loads(layer, scope) for layer in side.layers] for scope in side.scopes()}
            for when, side in sides.items()
        },
        headings={name: heading for name, heading in HEADINGS.items() if not math.isnan(overall[name])},
        dead=DEAD_THRESHOLD,
        information=information,
        lifts=[_lifts(layer.counts) for layer in layers],
        unfolded=sorted(by_bits[:OPEN_LAYERS]),
        folded=sorted(by_bits[OPEN_LAYERS:]),
        specialists={name: inspection.specialists(name, top) for name in inspection.domains} if several else {},
        comparison=comparison,
        top=top,
        before=comparison and {"title": _title(comparison.before), "description": _description(comparison.before)},
        tokens=_token_view(list(sides.values())),
        command=command and without_paths(command),
        versions={name: used[name] for name in ("hf_phibalance", "torch", "transformers") if name in used},
    )


def _token_view(sides: Sequence[Inspection]) -> dict[str, Any] | None:
    """Returns the examples of one or two inspections for the page: tokens by domain and text, and packed numbers for its script."""
    examples, layers = sides[0].examples, sides[0].layers
    if not examples:
        return None
    size = len(sides) * sum(layer.top_k * (2 if layer.experts <= 256 else 3) for layer in layers)  # bytes per token
    longest = max(EXAMPLE_BYTES // size // len(examples), 1)
    texts: dict[str, list[list[str]]] = {}
    for example in examples:
        shown = ["⏎\n".join(map(printable, token.split("\n"))) or "·" for token in example.tokens[:longest]]
        texts.setdefault(example.domain, []).append(shown)

    def packed(kind: str, parts: Sequence[Tensor]) -> str:
        numbers = array(kind, [number for part in parts for row in part[:longest].tolist() for number in row])
        return base64.b64encode(numbers.tobytes()).decode()

    models = []
    for side in sides:
        chosen = [
            packed("B" if layer.experts <= 256 else "H", [example.choices[index] for example in side.examples])
            for index, layer in enumerate(layers)
        ]
        weights = [
            packed("B", [(255 * example.weights[index]).round().int() for example in side.examples])
            for index in range(len(layers))
        ]
        models.append({"experts": chosen, "weights": weights})
    sizes = {"experts": [layer.experts for layer in layers], "top_k": [layer.top_k for layer in layers]}
    labels = layer_labels([layer.name for layer in layers])
    return {"texts": texts, "data": {"labels": labels, **sizes, "models": models}}


def _title(inspection: Inspection) -> str:
    """Returns the name of the model, without its folder."""
    name = str(inspection.model["name"])
    return Path(name).resolve().name if Path(name).exists() else name


def _description(inspection: Inspection) -> str:
    """Returns the model in one line."""
    model, count = inspection.model, inspection.model["parameters"]
    size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
    experts, top_k = (" or ".join(map(str, model[name])) for name in ("experts", "top_k"))
    return (
        f"{model['model_type']}, {size} parameters in {model['dtype']}, {model['routers']} routers of {experts} experts, "
        f"top-{top_k}; selection bias: {model['selection_bias']}"
    )


def _cutting(inspection: Inspection) -> str:
    """Returns how texts were cut into sequences."""
    seq_len = inspection.settings["seq_len"]
    if inspection.settings["packing"]:
        return f"The texts of a domain are joined by line ends and cut into sequences of {seq_len} tokens."
    return f"Each row and each plain text file is cut into sequences of at most {seq_len} tokens. No sequence holds two texts."


FORMS: dict[str, Callable[[float], str]] = {  # of figures that are not shown with three digits
    "mutual_information": "{:.4f}".format,
    "load_moved": "{:.1%}".format,
    "lift": "{:.2f}×".format,
    "change": lambda share: f"{100 * share:+.1f} pp",
}


def _marked(figures: Mapping[str, Any], name: str) -> str:
    """Returns a figure as text, with `≈` in front if chance explains it."""
    value, noise = figures[name], figures.get("noise", {})
    is_noise = value != 0 and (noise if isinstance(noise, bool) else noise.get(name, False))
    form = FORMS.get(name, str if isinstance(value, int) else "{:.3f}".format)
    return f"{'≈' if is_noise else ''}{form(value)}"


def _table(console: Console, heading: str, *columns: str) -> Table:
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for number, column in enumerate(columns):
        room = None if number else max(console.width - FIGURES_WIDTH, 8)  # a long name must not push out the figures
        table.add_column(column, justify="right" if number else "left", no_wrap=True, max_width=room)
    return table


def _print_loads(console: Console, rows: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Prints the relative load of each expert, a row per label."""
    console.print(Text("Load of each expert: ▄ is the fair share, × less than a twentieth of it", style="italic"))
    width = max(len(label) for label, _ in rows)
    for label, relative in rows:
        strip, room = load_strip(relative), max(console.width - width - 1, 8)
        for start in range(0, len(strip), room):
            console.print(Text(f"{'' if start else label:<{width}} ") + strip[start : start + room])


def _dimmed(text: str) -> Text:
    return Text(text, style="dim" if text.startswith("≈") else "")


def load_strip(relative: Sequence[float]) -> Text:
    """Returns one character for the relative load of each expert."""
    strip = Text()
    for value in relative:
        if value < DEAD_THRESHOLD:
            strip.append("×", style="magenta")
        else:
            level = min(max(int(value * 4), 1), 8)  # eighths of twice the fair share
            strip.append(" ▁▂▃▄▅▆▇█"[level], style="red" if value >= 2 else "blue" if value <= 0.5 else "")
    return strip


def _shade(value: float, reach: float) -> int:
    """Returns the colour of a value on a log scale, in per cent: 0 at 1, -100 at `2**-reach` and below, 100 at `2**reach` and above."""
    return -100 if value <= 0 else round(100 * max(-1.0, min(1.0, math.log2(value) / reach)))


def _lifts(counts_DE: Tensor) -> list[list[float]]:
    """Returns the lift of each expert in each domain, NaN where too few assignments are expected."""
    expected_DE = counts_DE.double().sum(1, keepdim=True) * counts_DE.sum(0) / counts_DE.sum()
    return lift(counts_DE).where(expected_DE >= FEWEST, math.nan).tolist()
