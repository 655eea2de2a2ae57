"""The report of the doctor, as text, as JSON and as a table in the terminal."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..files import versions


Status = Literal["ok", "warning", "problem"]
PRECISE, ROUGH = 1e-3, 2e-2  # allowed relative error of the coefficient in fp32, and in lower precision
MARKS = {"ok": "✓", "warning": "!", "problem": "✗"}
COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}
VERDICTS = {
    "ok": "All well: train.",
    "warning": "Fit to train, but read the remedies.",
    "problem": "Not fit to train as it is.",
}


@dataclass(frozen=True)
class Check:
    """The result of one check: its name (for example `"attention mask"`), its status, what was found, and what to do."""

    name: str
    status: Status
    finding: str
    remedy: str = ""


@dataclass(frozen=True)
class Coefficient:
    """
    The coefficient that one optimizer step received.

    Args:
        declared (`float`): `coef` of the configuration, at this step of its schedule.
        ratio (`float`):
            Received over declared coefficient: the added gradient projected on the declared one, times the share of the gradient
            of the routers' weights that the training loop kept.
        residual (`float`): norm of the part of the added gradient outside this projection, relative to the declared gradient.
        by_router (`dict[str, float]`): the ratio at each router that had something to route.
        parameters (`str`): where the gradients were compared.
        precise (`bool`): True if everything was float32. Then the ratio must be 1 within 1e-3, otherwise within 2e-2.
    """

    declared: float
    ratio: float
    residual: float
    by_router: dict[str, float]
    parameters: str
    precise: bool

    @property
    def effective(self) -> float:
        return self.declared * self.ratio

    @property
    def tolerance(self) -> float:
        return PRECISE if self.precise else ROUGH


@dataclass(frozen=True)
class DoctorReport:
    """
    The report of [`doctor`]; `print` it.

    Args:
        checks (`list[Check]`): the results of all checks.
        measured (`str`): names the step that was run.
        coefficient (`Coefficient`, *optional*): `None` if it could not be measured, or if there is no price gradient.
        model (`dict`): describes the examined model.
    """

    checks: list[Check]
    measured: str = "nothing was run"
    coefficient: Coefficient | None = None
    model: dict[str, Any] = field(default_factory=dict)
    title, verdicts = "φ-balance", VERDICTS

    @property
    def status(self) -> Status:
        """The worst status of all checks."""
        found = {check.status for check in self.checks}
        return "problem" if "problem" in found else "warning" if "warning" in found else "ok"

    @property
    def problems(self) -> list[Check]:
        return [check for check in self.checks if check.status == "problem"]

    def exit_status(self, strict: bool = False) -> int:
        """Returns the exit status of a script: 2 after a problem, 1 after a warning if `strict`, else 0."""
        return 2 if self.problems else 1 if strict and self.status == "warning" else 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain JSON values. A ratio that is not finite becomes `None`."""
        found = self.coefficient
        shown = None
        if found is not None:
            shown = dataclasses.asdict(found) | {"effective": found.effective}
            shown |= {name: None for name, v in shown.items() if isinstance(v, float) and not math.isfinite(v)}
            shown["by_router"] = {name: v if math.isfinite(v) else None for name, v in found.by_router.items()}
        return {
            "status": self.status,
            "coefficient": shown,
            "measured": self.measured,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "model": self.model,
            "versions": versions(),
        }

    def __str__(self) -> str:
        lines = [f"{self.title}, {self.measured}:"]
        for check in self.checks:
            lines.append(f"  {MARKS[check.status]} {check.name}: {check.finding}")
            if check.remedy:
                lines.append(f"    -> {check.remedy}")
        return "\n".join(lines)


def print_report(report: DoctorReport, console: Any) -> None:
    """Prints `report` to a `rich` console: the measured coefficient, a table of the checks, the remedies, the verdict."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    name = report.model.get("name") or report.model.get("class", "model")
    console.print(Text(f"{report.title} doctor  ", style="bold").append(str(name), style="bold cyan"))
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
        mark = Text(MARKS[check.status], style=f"bold {COLOURS[check.status]}")
        table.add_row(mark, Text(check.name), Text(check.finding))
    console.print()
    console.print(table)
    console.print()
    for check in sorted((c for c in report.checks if c.remedy), key=lambda c: c.status):
        console.print(Text(f"{check.status}, {check.name}", style=f"bold {COLOURS[check.status]}"))
        console.print(Padding(Text(check.remedy), (0, 0, 0, 2)), highlight=False)
    console.print(Text(report.verdicts[report.status], style=f"bold {COLOURS[report.status]}"))
