"""An [`Inspection`] in the terminal, by rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..files import layer_labels
from ..maths import DEAD_THRESHOLD, relative_load
from .figures import specialisation_figures
from .findings import Inspection
from .wording import HEADINGS, cutting, describe, figure_text, information_text, title


IN_TERMINAL = [name for name in HEADINGS if name != "chosen_probability"]  # as many as fit into 80 columns
FIGURES = 70  # characters of the columns beside names


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
            room = None if number else max(console.width - FIGURES, 8)  # a long name does not push out figures
            table.add_column(column, justify="right" if number else "left", no_wrap=True, max_width=room)
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
                    Text(by_name[entry["layer"]]),
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
    console.print(cutting(inspection.settings), style="dim", highlight=False)
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
