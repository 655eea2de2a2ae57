"""The command line of a file of plans that has `bases`: trains the bases that are missing, then the runs."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..records import Results
from ..workers import execute
from .bases import base_path, train_base
from .material import build_material, load_material
from .plans import load_plans
from .run import Base
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


class Trained:
    """Takes the results of bases, which are files, and keeps nothing."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Nothing: the weights are in their file."""


def train_base_on(run: BaseRun, output: Path, tell: Callable[[int], None]) -> dict:
    """[`train_base`], for workers."""
    start = time.perf_counter()
    figures = train_base(run.base, load_material(run.base.material, output), output, tell)
    return {"metrics": {**figures, "run_seconds": time.perf_counter() - start}}


def main(args: argparse.Namespace, console) -> int:
    """As `compare.command.main`, for plans of fine-tuning."""
    output, plans = load_plans(args.plans_file)
    output = Path(args.output_dir or output)
    if args.plans:
        unknown = sorted(set(args.plans) - {plan.name for plan in plans})
        if unknown:
            raise SystemExit(
                f"--plans: {args.plans_file} has no plan {unknown[0]!r}, but {', '.join(p.name for p in plans)}."
            )
        plans = [plan for plan in plans if plan.name in args.plans]
    for plan in plans:
        plan.seeds = [seed for seed in plan.seeds if not args.seeds or seed in args.seeds]
        plan.bases = [base for base in plan.bases if not args.models or base.model in args.models]
        plan.tasks = [task for task in plan.tasks if not args.tasks or task in args.tasks]
        plan.ways = [way for way in plan.ways if not args.ways or way in args.ways]
    results = Results(output / "results.jsonl")
    if args.refresh:
        from .tables import refresh

        args.refresh.write_text(refresh(args.refresh.read_text(encoding="utf-8"), plans, results), encoding="utf-8")
        return 0
    failed = 0
    if not (args.tables or args.pictures):
        for plan in plans:
            plan.corpus = build_material(args.data or plan.data, VOCABULARY, output).fingerprint
        runs = {(run.key, run.corpus): run for plan in plans for run in plan.runs()}
        todo = [run for run in runs.values() if run not in results]
        console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished ({results.path})")
        bases = {run.base.key: run.base for run in todo if not base_path(run.base, output).is_file()}
        if args.list:
            for run in [*map(BaseRun, bases.values()), *todo]:
                console.print(f"{run.key}  {run}", highlight=False, soft_wrap=True)
            return 0
        try:
            failed = execute([*map(BaseRun, bases.values())], Trained(), output, args.workers, console, train_base_on)
            failed += execute(todo, results, output, args.workers, console, tune_on)
        except KeyboardInterrupt:
            console.print("Interrupted. What is finished is kept; the same command goes on with the rest.")
            return 130
        if failed:
            console.print(f"[red]{failed} runs failed; the same command tries them again.")
    for plan in plans:
        written = []
        if args.tables or not args.pictures:
            from .tables import write_tables

            written += write_tables(plan, results, output)
        if args.pictures or not args.tables:
            from .pictures import write_pictures

            written += write_pictures(plan, results, output)
        if not written:
            console.print(f"no run of plan {plan.name!r} is finished in {results.path}", soft_wrap=True)
        for path in written:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 1 if failed else 0
