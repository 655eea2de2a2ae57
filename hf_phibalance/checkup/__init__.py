"""
Checkup: what is wrong with a set-up, found by trying one optimizer step that leaves no trace. Knows steps, not trainers.

| module | what it holds |
|---|---|
| `report` | checks, what they found, exit status |
| `trial` | the step that is tried out, and what is kept meanwhile |
| `coefficient` | the coefficient that the step received, against its definition |
| `observation` | what else the trial shows: tokens, routers that ran, what precision and bias change |
| `subject` | what is examined |
| `setup`, `first_step` | each problem by name, with its remedy: without running anything, and by the trial |
| `checks` | all of them |
| `tables` | the report in the terminal |
"""

from .checks import run_checks
from .observation import Observation, observe
from .report import Check, Coefficient, DoctorReport
from .subject import Subject
from .tables import print_report
from .trial import Kept, RawStep, Step, made_batch


__all__ = [
    "Check",
    "Coefficient",
    "DoctorReport",
    "Kept",
    "Observation",
    "RawStep",
    "Step",
    "Subject",
    "made_batch",
    "observe",
    "print_report",
    "run_checks",
]
