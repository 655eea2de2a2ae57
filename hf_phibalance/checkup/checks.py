"""All checks, in the order in which one would want to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import first_step, setup
from .report import Check
from .subject import Subject


CHECKS: tuple[Callable[[Subject], Iterator[Check]], ...] = (
    first_step.coefficient,
    first_step.step_runs,
    setup.patched,
    setup.wiring,
    setup.auxiliary_loss,
    first_step.tokens,
    first_step.routers_run,
    first_step.precision,
    setup.checkpointing,
    setup.parallelism,
    setup.selection_bias,
    setup.state_file,
    setup.versions,
)


def run_checks(subject: Subject) -> list[Check]:
    """What all checks that apply have to say."""
    return [check for look in CHECKS for check in look(subject)]
