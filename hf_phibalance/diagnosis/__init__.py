"""
Finds what is wrong with a set-up from one optimizer step. Does not import trainers.

| module | what it holds |
|---|---|
| `recorder` | records a real step, and measures the coefficient that it received |
| `checks` | one check for each problem, with its remedy |
| `report` | the findings as text, JSON and a table |
"""

from .checks import Subject, run_checks
from .recorder import StepRecorder
from .report import Check, Coefficient, DoctorReport, print_report


__all__ = ["Check", "Coefficient", "DoctorReport", "StepRecorder", "Subject", "print_report", "run_checks"]
