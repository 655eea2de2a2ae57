"""
Diagnosis: finds what is wrong with a set-up by one optimizer step. Knows steps, not trainers.

| module | what it holds |
|---|---|
| `recorder` | records a real step, and measures the coefficient that it received |
| `checks` | each problem by name, with its remedy |
| `report` | the findings as text, JSON and a table |
"""

from .checks import Subject, run_checks
from .recorder import StepRecorder
from .report import Check, Coefficient, DoctorReport, print_report


__all__ = ["Check", "Coefficient", "DoctorReport", "StepRecorder", "Subject", "print_report", "run_checks"]
