"""What the command line does with a file of plans that has `bases`: trains those that are missing, then the runs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .bases import base_path, train_base
from .material import build_material, load_material
from .plans import Plan, load_plans
from .run import Base, Tuning
from .tuning import tune_on


VOCABULARY = 1024


@dataclasses.dataclass
class BaseRun:
    """A base as something that workers train."""

    base: Base

    @property
    def steps(self) -> int:
        return self.base.steps

    @property
    def key(self) -> str:
        return self.base.key

    def __str__(self) -> str:
        return f"base {self.base.name}"


def train_base_on(run: BaseRun, output: Path, tell: Callable[[int], None]) -> dict:
    """[`train_base`], for workers."""
    start = time.perf_counter()
    figures = train_base(run.base, load_material(run.base.material, output), output, tell)
    return {"metrics": {**figures, "run_seconds": time.perf_counter() - start}}


class FineTuning:
    """What is particular to plans of fine-tuning, as `compare.command.FromScratch` says it of the others."""

    narrowing = ("models", "tasks", "ways", "seeds")
    train = staticmethod(tune_on)
    train_before = staticmethod(train_base_on)

    def load_plans(self, path: Path) -> tuple[str, list[Plan]]:
        return load_plans(path)

    def narrow(self, plan: Plan, name: str, wanted: Sequence[Any]) -> None:
        if name == "models":
            plan.bases = [base for base in plan.bases if base.model in wanted]
        else:
            setattr(plan, name, [value for value in getattr(plan, name) if value in wanted])

    def set_corpora(self, plans: Sequence[Plan], data: str | None, output: Path) -> None:
        for plan in plans:
            plan.corpus = build_material(data or plan.data, VOCABULARY, output).fingerprint

    def before(self, runs: Sequence[Tuning], output: Path) -> list[BaseRun]:
        bases = {run.base.key: run.base for run in runs if not base_path(run.base, output).is_file()}
        return [BaseRun(base) for base in bases.values()]

    @property
    def tables(self) -> Any:
        from . import tables

        return tables

    @property
    def pictures(self) -> Any:
        from . import pictures

        return pictures
