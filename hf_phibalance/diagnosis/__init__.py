"""
Checkup: finds what is wrong with a set-up by one optimizer step. Knows steps, not trainers.

| module | what it holds |
|---|---|
| `recorder` | records a real step, and measures the coefficient that it received |
| `trial` | runs a step of a model's loss, and restores everything afterwards |
| `checks` | each problem by name, with its remedy |
| `report` | findings of the checks, exit status |
| `tables` | the report in the terminal |
"""

from __future__ import annotations

from .checks import Subject, run_checks
from .recorder import StepRecorder
from .report import Check, Coefficient, DoctorReport
from .tables import print_report
from .trial import eager, made_batch, try_step


__all__ = [
    "Check",
    "Coefficient",
    "DoctorReport",
    "StepRecorder",
    "Subject",
    "eager",
    "made_batch",
    "print_report",
    "run_checks",
    "try_step",
]
