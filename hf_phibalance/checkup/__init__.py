"""
Checkup: what is wrong with a set-up, found by looking at one optimizer step. Knows steps, not trainers.

| module | what it holds |
|---|---|
| `recorder` | recording a real step, and the coefficient that it received |
| `trial` | a step of a model's loss that leaves no trace |
| `checks` | each problem by name, with its remedy |
| `report` | checks, what they found, exit status |
| `tables` | the report in the terminal |
"""

from __future__ import annotations

from .checks import Subject, run_checks
from .recorder import StepRecorder
from .report import Check, Coefficient, DoctorReport
from .tables import print_report
from .trial import made_batch, try_step


__all__ = [
    "Check",
    "Coefficient",
    "DoctorReport",
    "StepRecorder",
    "Subject",
    "made_batch",
    "print_report",
    "run_checks",
    "try_step",
]
