"""Training many runs: each in a process of one torch thread, tried again if that is killed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any


Train = Callable[[Any, Path, Callable[[int], None]], dict]
ATTEMPTS = 3  # a run whose worker was killed is tried so often
# glibc in the workers keeps what is freed: giving it back and faulting it in again costs up to a third of such small steps
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(10**11)}


def execute(runs, keep: Callable[[dict], None], output: Path, workers: int, console, train: Train) -> int:
    """
    Trains `runs`, `workers` at a time; returns how many failed.

    Args:
        keep (`Callable`): Takes each result as it comes.
        train (`Callable`): A function of a module, `train(run, output, tell)`, which returns the line of a result;
            `tell(step)` says how far it is.
    """
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
                futures = {pool.submit(work, train, index, run, str(output)): index for index, run in waiting.items()}
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
                            console.print(f"[red]{runs[index]}: {type(error).__name__}: {error}")
                            continue
                        waiting.pop(index)
                        keep(record)
                        console.print(f"{runs[index]}  {summary(record)}", highlight=False, soft_wrap=True)
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
                        console.print(f"[red]{runs[index]}: its worker was killed {ATTEMPTS} times")
                console.print(f"[yellow]A worker was killed (out of memory?); {len(waiting)} runs go on.")
    return failed


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


def work(train: Train, index: int, run, output: str) -> dict:
    """One run, in a worker."""

    def tell(step: int) -> None:
        _steps_done[index] = step

    return train(run, Path(output), tell)
