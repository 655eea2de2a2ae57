"""
Compare balancing methods: tiny Mixture-of-Experts models, trained from scratch on real text of three domains.

# Train everything that a file of plans asks for and write its tables and pictures; can be interrupted and called again
python recipes/compare.py recipes/compare/main.yaml --data path/to/data --workers 2

# Some plans of it only; a first look that needs no data; what is still to be run; only the tables and pictures; only the
# tables between the marks of a document
python recipes/compare.py recipes/compare/main.yaml --plans price --workers 2
python recipes/compare.py recipes/compare/smoke.yaml
python recipes/compare.py recipes/compare/main.yaml --list
python recipes/compare.py recipes/compare/main.yaml --tables --pictures
python recipes/compare.py recipes/compare/main.yaml --refresh recipes/compare/README.md

A plan is a product of methods, models, streams and seeds (see recipes/compare/plans.py); in a file that has `bases`, of
methods, bases, tasks, ways to fine-tune and seeds (see recipes/compare/finetuning/plans.py). Each finished run is one line of
`<output>/results.jsonl`, found again by everything it depends on; a run that was interrupted starts anew. Every worker is
a process of one torch thread. `<output>/<plan>.md` has a table for each model and stream: means and standard deviations
over the seeds, and differences to the plan's baseline paired by seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plans import Plan, load_plans, read_plans_file
from .records import Results
from .workers import Train, execute


NARROWING = ("models", "streams", "tasks", "ways", "seeds")  # options that leave out a part of the plans


class FromScratch:
    """What is particular to plans of training from scratch."""

    narrowing = ("models", "streams", "seeds")

    def load_plans(self, path: Path) -> tuple[str, list[Plan]]:
        return load_plans(path)

    def narrow(self, plan: Plan, name: str, wanted: Sequence[Any]) -> None:
        """Leaves of `plan` what has one of the `wanted` models, streams, ..."""
        setattr(plan, name, [value for value in getattr(plan, name) if value in wanted])

    def set_corpora(self, plans: Sequence[Plan], data: str | None, output: Path) -> None:
        """Gives the plans the fingerprints of their text, which is read, split and tokenised unless that was done before."""
        from .corpus import build_corpus

        known: dict[tuple, str] = {}
        for plan in plans:
            wanted = (data or plan.data, plan.window, plan.vocab_size, plan.validation_windows)
            if wanted not in known:
                known[wanted] = build_corpus(*wanted, cache=output / "text").fingerprint
            plan.corpus = known[wanted]

    def before(self, runs: Sequence[Any], output: Path) -> list[Any]:
        """What must be trained before `runs` and leaves no result."""
        return []

    @property
    def train(self) -> Train:
        from .loop import train_on

        return train_on

    train_before = train

    @property
    def tables(self) -> Any:
        from . import tables

        return tables

    @property
    def pictures(self) -> Any:
        from . import plots

        return plots


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    from rich.console import Console

    console = Console()
    kind: Any = FromScratch()
    if "bases" in read_plans_file(args.plans_file):
        from .finetuning.command import FineTuning

        kind = FineTuning()
    output, plans = kind.load_plans(args.plans_file)
    output = Path(args.output_dir or output)
    plans = chosen(kind, plans, args)
    results = Results(output / "results.jsonl")
    if args.refresh:
        text = args.refresh.read_text(encoding="utf-8")
        args.refresh.write_text(kind.tables.refresh(text, plans, results), encoding="utf-8")
        return 0
    failed = 0
    if not (args.tables or args.pictures):
        kind.set_corpora(plans, args.data, output)
        runs = {(run.key, run.corpus): run for plan in plans for run in plan.runs()}  # plans may share runs
        todo = [run for run in runs.values() if run not in results]
        console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished ({results.path})")
        before = kind.before(todo, output)
        if args.list:
            for run in [*before, *todo]:
                console.print(f"{run.key}  {run}", highlight=False, soft_wrap=True)
            return 0
        try:
            failed = execute(before, lambda record: None, output, args.workers, console, kind.train_before)
            failed += execute(todo, results.add, output, args.workers, console, kind.train)
        except KeyboardInterrupt:
            console.print("Interrupted. What is finished is kept; the same command goes on with the rest.")
            return 130
        if failed:
            console.print(f"[red]{failed} runs failed; the same command tries them again.")
    render(kind, plans, results, output, console, tables=args.tables, pictures=args.pictures)
    return 1 if failed else 0


def chosen(kind: Any, plans: list[Any], args: argparse.Namespace) -> list[Any]:
    """The plans, and of each the part, that the options ask for; refuses options that these plans have no use for."""
    if args.plans:
        unknown = sorted(set(args.plans) - {plan.name for plan in plans})
        if unknown:
            raise SystemExit(
                f"--plans: {args.plans_file} has no plan {unknown[0]!r}, but {', '.join(p.name for p in plans)}."
            )
        plans = [plan for plan in plans if plan.name in args.plans]
    for name in NARROWING:
        wanted = getattr(args, name)
        if wanted and name not in kind.narrowing:
            raise SystemExit(
                f"--{name}: the plans of {args.plans_file} have no {name}, but {', '.join(kind.narrowing)}."
            )
        for plan in plans if wanted else ():
            kind.narrow(plan, name, wanted)
    return plans


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans_file", type=Path, help="YAML file of plans")
    parser.add_argument("--plans", nargs="+", metavar="NAME", help="only these plans of the file")
    parser.add_argument("--models", nargs="+", help="of these plans, only what has these models")
    parser.add_argument("--streams", nargs="+", help="... these streams")
    parser.add_argument("--tasks", nargs="+", help="... these tasks (of fine-tuning)")
    parser.add_argument("--ways", nargs="+", help="... these ways (of fine-tuning)")
    parser.add_argument("--seeds", nargs="+", type=int, help="... these seeds")
    parser.add_argument(
        "--data",
        help="folder with gsm8k/train.jsonl and wikitext2/, or 'built-in' (default: the file's `data`, else 'built-in')",
    )
    parser.add_argument("--output_dir", type=Path, help="results folder (default: the file's `output`)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--list", action="store_true", help="only say which runs are missing")
    parser.add_argument("--tables", action="store_true", help="train nothing, write the tables of what there is")
    parser.add_argument("--pictures", action="store_true", help="train nothing, draw the pictures of what there is")
    parser.add_argument(
        "--refresh", type=Path, help="train nothing, make the marked tables of this Markdown file anew"
    )
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}.")
    return args


def render(kind: Any, plans: list[Any], results: Results, output: Path, console, tables: bool, pictures: bool) -> None:
    """Writes what can be written from the finished runs; both kinds unless one is asked for."""
    both = tables == pictures
    for plan in plans:
        written = []
        if tables or both:
            written += kind.tables.write_tables(plan, results, output)
        if pictures or both:
            written += kind.pictures.write_pictures(plan, results, output)
        if not written:
            console.print(f"no run of plan {plan.name!r} is finished in {results.path}", soft_wrap=True)
        for path in written:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)
