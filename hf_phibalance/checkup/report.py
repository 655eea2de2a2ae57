"""What a checkup found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..reporting import versions


Status = Literal["ok", "warning", "problem"]
MARKS: dict[str, str] = {"ok": "✓", "warning": "!", "problem": "✗"}


@dataclass(frozen=True)
class Check:
    """
    One thing that was looked at.

    Args:
        name (`str`): what, e.g. `"attention mask"`.
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
            Effective over declared one: the projection of what balancing added to the gradient on what is declared, times what
            the loop left of the gradient of the routers' weights.
        residual (`float`): norm of what is left of the added gradient, relative to the declared one.
        by_router (`dict[str, float]`): the ratio at each router that had something to route.
        parameters (`str`): where the gradient was compared.
        precise (`bool`): whether everything was float32, so that the ratio must be 1 within 1e-3.
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


@dataclass(frozen=True)
class DoctorReport:
    """
    What [`doctor`] returns; as text, all of it without colours.

    Args:
        checks (`list[Check]`): everything that was looked at.
        measured (`str`): what was run for that.
        coefficient (`Coefficient`, *optional*): `None` if there is none, or if it could not be measured.
        model (`dict`): what was examined.
    """

    checks: list[Check]
    measured: str = "nothing was run"
    coefficient: Coefficient | None = None
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        """The worst of all checks."""
        found = {check.status for check in self.checks}
        return "problem" if "problem" in found else "warning" if "warning" in found else "ok"

    @property
    def problems(self) -> list[Check]:
        return [check for check in self.checks if check.status == "problem"]

    def exit_status(self, strict: bool = False) -> int:
        """For scripts: 0 if all is well, 2 after a problem, 1 after a warning if `strict`."""
        return 2 if self.problems else 1 if strict and self.status == "warning" else 0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        coefficient = self.coefficient
        shown = (
            None
            if coefficient is None
            else _without_nan(dataclasses.asdict(coefficient) | {"effective": coefficient.effective})
        )
        return {
            "status": self.status,
            "coefficient": shown,
            "measured": self.measured,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "model": self.model,
            "versions": versions(),
        }

    def __str__(self) -> str:
        return "\n".join([f"φ-balance, {self.measured}:", *_lines(self.checks)])


def _without_nan(value: Any) -> Any:
    """`value` with `None` for what is no finite number, as JSON wants it."""
    if isinstance(value, dict):
        return {name: _without_nan(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(checks: Sequence[Check]) -> list[str]:
    lines = []
    for check in checks:
        lines.append(f"  {MARKS[check.status]} {check.name}: {check.finding}")
        if check.remedy:
            lines.append(f"    -> {check.remedy}")
    return lines
