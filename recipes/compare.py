# Copyright 2026 The hf_phibalance authors.
# SPDX-License-Identifier: Apache-2.0
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

A plan is a product of methods, models, streams and seeds (see recipes/compare/plans.py). Each finished run is one line of
`<output>/results.jsonl`, found again by everything it depends on; a run that was interrupted starts anew. Every worker is
a process of one torch thread. `<output>/<plan>.md` has a table for each model and stream: means and standard deviations
over the seeds, and differences to the plan's baseline paired by seed.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from multiprocessing.sharedctypes import RawArray
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "compare"))

from plans import Plan, load_plans  # noqa: E402, lies in the folder of that name
from records import Results  # noqa: E402


ATTEMPTS = 3  # a run whose worker was killed is tried so often
# glibc in the workers keeps what is freed: giving it back and faulting it in again costs up to a third of such small steps
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    from rich.console import Console

    console = Console()
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
        for name in ("models", "streams", "seeds"):
            wanted = getattr(args, name)
            setattr(plan, name, [value for value in getattr(plan, name) if not wanted or value in wanted])
    results = Results(output / "results.jsonl")
    if args.refresh:
        from tables import refresh

        args.refresh.write_text(refresh(args.refresh.read_text(encoding="utf-8"), plans, results), encoding="utf-8")
        return 0
    if not (args.tables or args.pictures):
        plans = with_corpora(plans, args.data, output)
        runs = {(run.key, run.corpus): run for plan in plans for run in plan.runs()}  # plans may share runs
        todo = [run for run in runs.values() if run not in results]
        console.print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished ({results.path})")
        if args.list:
            for run in todo:
                console.print(
                    f"{run.key}  {run.model} {run.stream} seed {run.seed}  {run.method}",
                    highlight=False,
                    soft_wrap=True,
                )
            return 0
        try:
            failed = execute(todo, results, output, args.workers, console)
        except KeyboardInterrupt:
            console.print("Interrupted. What is finished is kept; the same command goes on with the rest.")
            return 130
        if failed:
            console.print(f"[red]{failed} runs failed; the same command tries them again.")
    else:
        failed = 0
    render(plans, results, output, console, tables=args.tables, pictures=args.pictures)
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans_file", type=Path, help="YAML file of plans")
    parser.add_argument("--plans", nargs="+", metavar="NAME", help="only these plans of the file")
    parser.add_argument("--models", nargs="+", help="of these plans, only what has these models")
    parser.add_argument("--streams", nargs="+", help="... these streams")
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


def with_corpora(plans: list[Plan], data: str | None, output: Path) -> list[Plan]:
    """The plans with the fingerprints of their text, which is read, split and tokenised unless that was done before."""
    from streams import build_corpus

    known: dict[tuple, str] = {}
    for plan in plans:
        wanted = (data or plan.data, plan.window, plan.vocab_size, plan.validation_windows)
        if wanted not in known:
            known[wanted] = build_corpus(*wanted, cache=output / "text").fingerprint
        plan.corpus = known[wanted]
    return plans


# ---------------------------------------------------------------------- training


def execute(runs, results: Results, output: Path, workers: int, console) -> int:
    """Trains `runs`, `workers` at a time, and keeps each result as it comes; returns how many failed."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not runs:
        return 0
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    context = get_context("forkserver")  # forks before any thread has started, and imports once for all workers
    context.set_forkserver_preload(["hf_phibalance"])
    steps_done = RawArray("l", len(runs))  # each entry has one writer, so that a killed worker leaves no lock behind
    waiting = dict(enumerate(runs))
    attempts = dict.fromkeys(waiting, 0)
    total = sum(run.steps for run in runs)
    failed = 0
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("steps", total=total)
        while waiting:
            pool = ProcessPoolExecutor(min(workers, len(waiting)), context, initialize, (steps_done,))
            try:
                futures = {pool.submit(work, index, run, str(output)): index for index, run in waiting.items()}
                broken = False
                while futures and not broken:
                    finished, _ = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                    progress.update(bar, completed=sum(steps_done))
                    for future in finished:
                        index = futures.pop(future)
                        try:
                            record = future.result()
                        except BrokenProcessPool:  # a worker was killed; which one is not known
                            broken = True
                            continue
                        except Exception as error:
                            waiting.pop(index)
                            failed += 1
                            console.print(f"[red]{describe(runs[index])}: {type(error).__name__}: {error}")
                            continue
                        waiting.pop(index)
                        results.add(record)
                        console.print(f"{describe(runs[index])}  {summary(record)}", highlight=False, soft_wrap=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what still waits must not start after Ctrl-C
                raise
            pool.shutdown()
            if broken:
                begun = [index for index in waiting if steps_done[index]]
                if not begun:
                    raise RuntimeError("the workers die before their first step; try one run with --workers 1.")
                for index in begun:
                    steps_done[index], attempts[index] = 0, attempts[index] + 1
                    if attempts[index] == ATTEMPTS:
                        waiting.pop(index)
                        failed += 1
                        console.print(f"[red]{describe(runs[index])}: its worker was killed {ATTEMPTS} times")
                console.print(f"[yellow]A worker was killed (out of memory?); {len(waiting)} runs go on.")
    return failed


def describe(run) -> str:
    method = " ".join(f"{name}={value}" for name, value in run.method.items()) or "defaults"
    return f"{run.model} {run.stream} seed {run.seed}  {method}"


def summary(record: dict) -> str:
    figures = record["metrics"]
    if "diverged_at" in figures:
        return f"diverged at step {figures['diverged_at']}"
    return f"loss {figures['loss']:.3f}  MaxVio {figures['max_vio_global']:.3f}  {figures['run_seconds']:.0f} s"


def initialize(steps_done) -> None:
    """In every worker, before its first run."""
    global _steps_done
    _steps_done = steps_done
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def end_with_parent() -> None:
    """A worker whose command was killed must not go on alone."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def work(index: int, run, output: str) -> dict:
    """One run, in a worker."""
    from loop import train
    from streams import load_corpus

    def tell(step: int) -> None:
        _steps_done[index] = step

    return train(run, load_corpus(run.corpus, Path(output) / "text"), tell)


# ---------------------------------------------------------------------- tables and pictures


def render(plans: list[Plan], results: Results, output: Path, console, tables: bool, pictures: bool) -> None:
    """Writes what can be written from the finished runs; both kinds unless one is asked for."""
    from tables import write_pictures, write_tables

    both = tables == pictures
    for plan in plans:
        written = []
        if tables or both:
            written += write_tables(plan, results, output)
        if pictures or both:
            written += write_pictures(plan, results, output)
        if not written:
            console.print(f"no run of plan {plan.name!r} is finished in {results.path}", soft_wrap=True)
        for path in written:
            console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    began = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - began:.0f} s")
    sys.exit(code)
