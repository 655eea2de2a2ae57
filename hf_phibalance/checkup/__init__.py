"""Checkup: what is wrong with a set-up."""

from .report import Check, Coefficient, DoctorReport
from .tables import print_report


__all__ = ["Check", "Coefficient", "DoctorReport", "print_report"]
