"""The findings of a checkup."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..files import versions


Status = Literal["ok", "warning", "problem"]
PRECISE, ROUGH = 1e-3, 2e-2  # allowed relative error of the coefficient in fp32, and in lower precision
MARKS: dict[str, str] = {"ok": "✓", "warning": "!", "problem": "✗"}


@dataclass(frozen=True)
class Check:
    """
    The result of one check.

    Args:
        name (`str`): of the check, e.g. `"attention mask"`.
        status (`str`): `"ok"`, `"warning"` or `"problem"`.
        finding (`str`): what was found.
        remedy (`str`, *optional*): what to do about it.
    """

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
            Effective over declared coefficient: the added gradient projected on the declared one, times the share of the
            gradient of the routers' weights that the loop kept.
        residual (`float`): norm of the added gradient without this projection, relative to the declared one.
        by_router (`dict[str, float]`): the ratio at each router that had something to route.
        parameters (`str`): where the gradient was compared.
        precise (`bool`): whether everything was float32, so that the ratio must be 1 within 1e-3, else within 2e-2.
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
        checks (`list[Check]`): results of all checks.
        measured (`str`): what was run.
        coefficient (`Coefficient`, *optional*): `None` if there is none, or if it could not be measured.
        model (`dict`): description of the examined model.
    """

    checks: list[Check]
    measured: str = "nothing was run"
    coefficient: Coefficient | None = None
    model: dict[str, Any] = field(default_factory=dict)

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
        """Returns the report as plain JSON values."""
        found = self.coefficient
        shown = None if found is None else dataclasses.asdict(found) | {"effective": found.effective}
        return {
            "status": self.status,
            "coefficient": _without_nan(shown),
            "measured": self.measured,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "model": self.model,
            "versions": versions(),
        }

    def __str__(self) -> str:
        lines = [f"φ-balance, {self.measured}:"]
        for check in self.checks:
            lines.append(f"  {MARKS[check.status]} {check.name}: {check.finding}")
            if check.remedy:
                lines.append(f"    -> {check.remedy}")
        return "\n".join(lines)


def _without_nan(value: Any) -> Any:
    """Returns `value` with `None` in place of numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
