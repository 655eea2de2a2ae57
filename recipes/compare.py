"""
Compare balancing methods on small Mixture-of-Experts models, trained from scratch or fine-tuned.

# Train all runs of a file of plans and write their tables and pictures. Can be interrupted and called again.
python recipes/compare.py recipes/compare/main.yaml --data path/to/data --workers 2

# Some of its plans; a first look that needs no data; which runs are missing; tables and pictures of the finished runs; only the
# marked tables of a document
python recipes/compare.py recipes/compare/main.yaml --plans price --workers 2
python recipes/compare.py recipes/compare/smoke.yaml
python recipes/compare.py recipes/compare/main.yaml --list
python recipes/compare.py recipes/compare/main.yaml --report
python recipes/compare.py recipes/compare/main.yaml --refresh recipes/compare/README.md

`recipes/compare/harness.py` says what a file of plans holds. A finished run is one line of `<output>/results.jsonl`, found again
by all that it depends on. A run that was interrupted starts anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from compare import pictures, tables  # the package compare/ beside this file: Python prefers packages to modules
from compare.harness import Plan, Results, execute, load_plans

from hf_phibalance.files import replace_unprintable


AXES = ("models", "streams", "bases", "tasks", "ways", "starts")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    output, plans = load_plans(args.plans_file)
    output = args.output_dir or output
    plans = chosen(plans, args)
    results = Results(output / "results.jsonl")
    if args.refresh:
        text = args.refresh.read_text(encoding="utf-8")
        args.refresh.write_text(tables.refresh(text, plans, results), encoding="utf-8")
        return 0
    failed = 0
    if not args.report:
        for plan in plans:
            plan.settings["corpus"] = plan.run_class.prepare(args.data or plan.data, plan.settings, output)
        runs = {(run.key, run.corpus): run for plan in plans for run in plan.all_runs()}  # plans may share runs
        todo = [run for run in runs.values() if run not in results]
        needed = {job.key: job for run in todo for job in run.needs(output)}
        print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished ({results.path})")
        if args.list:
            for job in (*needed.values(), *todo):
                print(f"{job.key}  {job}")
            return 0
        try:
            failed = sum(execute(jobs, output, args.workers, args.threads) for jobs in (list(needed.values()), todo))
        except KeyboardInterrupt:
            print("Interrupted. Finished runs are kept; the same command goes on with the rest.")
            return 130
        if failed:
            print(f"{failed} runs failed; the same command tries them again.")
        results = Results(results.path)
    for plan in plans:
        written = [*tables.write_tables(plan, results, output), *pictures.write_pictures(plan, results, output)]
        for path in written:
            print(f"wrote {path}")
        if not written:
            print(f"no run of plan {plan.name!r} is finished in {results.path}")
    return 1 if failed else 0


def chosen(plans: list[Plan], args: argparse.Namespace) -> list[Plan]:
    """Returns the plans, reduced to what the options select."""
    if args.plans:
        unknown = sorted(set(args.plans) - {plan.name for plan in plans})
        if unknown:
            names = ", ".join(plan.name for plan in plans)
            raise SystemExit(f"--plans: {args.plans_file} has no plan {unknown[0]!r}, but {names}.")
        plans = [plan for plan in plans if plan.name in args.plans]
    for plan in plans:
        plan.seeds = [seed for seed in plan.seeds if not args.seeds or seed in args.seeds]
        for axis in AXES:
            wanted = getattr(args, axis)
            if wanted and axis not in plan.axes:
                raise SystemExit(
                    f"--{axis}: the plans of {args.plans_file} have no {axis}, but {', '.join(plan.axes)}."
                )
            if wanted:
                plan.axes[axis] = {name: value for name, value in plan.axes[axis].items() if name in wanted}
    return plans


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans_file", type=Path, help="YAML file of plans")
    parser.add_argument("--plans", nargs="+", metavar="NAME", help="only these plans of the file")
    for axis in AXES:
        parser.add_argument(f"--{axis}", nargs="+", metavar="NAME", help=f"of these plans, only these {axis}")
    parser.add_argument("--seeds", nargs="+", type=int, help="of these plans, only these seeds")
    parser.add_argument(
        "--data",
        help="folder with gsm8k/, wikitext2/ and, for fine-tuning, mbpp/; or 'built-in' (default: the plan's `data`)",
    )
    parser.add_argument("--output_dir", type=Path, help="results folder (default: the file's `output`)")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default: 1)")
    parser.add_argument("--list", action="store_true", help="only print the missing runs")
    parser.add_argument("--report", action="store_true", help="train nothing; write tables and pictures")
    parser.add_argument("--refresh", type=Path, help="train nothing; renew the marked tables of this Markdown file")
    args = parser.parse_args(arguments)
    for name in ("workers", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    return args


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
