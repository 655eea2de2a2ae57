"""Prints a [`DoctorReport`] in the terminal, by rich."""

from __future__ import annotations

from typing import Any

from .report import MARKS, DoctorReport


COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
VERDICTS = {
    "ok": "All well: train.",
    "warning": "Fit to train, but read the remedies.",
    "problem": "Not fit to train as it is.",
}


def print_report(report: DoctorReport, console: Any) -> None:
    """Prints `report` to a `rich` console: what was measured, a table of the checks, the remedies, the verdict."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    name = report.model.get("name") or report.model.get("class", "model")
    console.print(Text("φ-balance doctor  ", style="bold").append(str(name), style="bold cyan"))
    console.print(Text(f"tried out: {report.measured}", style="dim"), highlight=False)
    found = report.coefficient
    if found is not None:
        colour = COLOURS[next((check.status for check in report.checks if check.name == "coefficient"), "ok")]
        line = Text("\ncoefficient  ").append(f"{found.effective:.6g}", style=f"bold {colour}")
        line.append(f"  received of {found.declared:g} declared, ")
        console.print(line.append(f"ratio {found.ratio:.4f}", style=colour), highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=False)
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap)
    for check in report.checks:
        colour = COLOURS[check.status]
        table.add_row(Text(MARKS[check.status], style=f"bold {colour}"), Text(check.name), Text(check.finding))
    console.print()
    console.print(table)
    console.print()
    for check in sorted((c for c in report.checks if c.remedy), key=lambda c: c.status):
        console.print(Text(f"{check.status}, {check.name}", style=f"bold {COLOURS[check.status]}"))
        console.print(Padding(Text(check.remedy), (0, 0, 0, 2)), highlight=False)
    console.print(Text(f"{VERDICTS[report.status]}", style=f"bold {COLOURS[report.status]}"))
