"""
Finds what is wrong with a set-up from one optimizer step. Does not import trainers.

| module | what it holds |
|---|---|
| `recorder` | records a real step, and measures the coefficient that it received |
| `checks` | one check for each problem, with its remedy |
| `report` | the findings as text, JSON and a table |
| `stock` | records a step of an unpatched model, and measures the coefficient of its built-in loss |
| `reasons` | why that coefficient is not the declared one |
"""

from .checks import Subject, run_checks
from .reasons import REASONS, AuditReport, Declared, explain
from .recorder import StepRecorder
from .report import Check, Coefficient, DoctorReport, print_report
from .stock import StockRecorder


__all__ = [
    "REASONS",
    "AuditReport",
    "Check",
    "Coefficient",
    "Declared",
    "DoctorReport",
    "StepRecorder",
    "StockRecorder",
    "Subject",
    "explain",
    "print_report",
    "run_checks",
]
