"""Starting a run, killing it, starting it again."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import hf_phibalance as phb

from .training import EVERY, STEPS, contents_of, step_of, train
from .traps import Trap


# what is imported here need not be imported by each of a thousand processes
FORK = multiprocessing.get_context("fork")
DEADLINE = 300  # seconds, for anything to happen


@dataclass
class Run:
    """A run of `ranks` processes that may die and be started again: `output` is its output folder, `home` what is ours."""

    home: Path
    output: Path
    ranks: int
    keep: int | None = 1

    @property
    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    @property
    def newest(self) -> int:
        """The step that it would resume from."""
        newest = phb.last_checkpoint(self.output)
        return 0 if newest is None else step_of(newest)

    @property
    def ends(self) -> list[dict[str, Any]]:
        return [torch.load(self.home / f"end-{rank}.pt", weights_only=False) for rank in range(self.ranks)]

    def start(self, trap: Trap | None = None, victim: int = 0, delay: float = 0.0, others: float = 0.0) -> list[int]:
        """
        Starts it, lets `trap` kill the rank `victim` (`delay` seconds after what it waits for, where it is the parent who
        kills), and the other rank `others` seconds after the first has died. Returns the exit codes by rank.
        """
        port = free_port()
        processes = []
        for rank in range(self.ranks):
            its_trap = trap if rank == victim else None
            arguments = (self.output, self.home, rank, self.ranks, port, its_trap, self.keep)
            processes.append(FORK.Process(target=train, args=arguments))
            processes[-1].start()
        try:
            if trap is not None and trap.by_parent:
                if trap.moment != "any":
                    wait([trap.told, *(process.sentinel for process in processes)])
                time.sleep(delay)
                os.kill(processes[victim].pid, signal.SIGKILL)
            running = list(processes)
            while running:
                wait([process.sentinel for process in running])
                running = [process for process in running if process.exitcode is None]
                if any(process.exitcode for process in processes):
                    time.sleep(others)
                    break
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [process.exitcode for process in processes]

    def start_and_end(self) -> None:
        """Starts it, and lets nothing happen to it."""
        codes = self.start()
        if any(codes):
            raise RuntimeError(f"a run that nobody touched ended with exit codes {codes}:\n{self.log[-3000:]}")


def wait(objects: list[Any]) -> None:
    if not multiprocessing.connection.wait(objects, DEADLINE):
        raise TimeoutError(f"nothing happened for {DEADLINE} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@dataclass
class Untouched:
    """What the run that nobody kills wrote and ended with, and how long that takes."""

    checkpoints: dict[int, dict[str, Any]]
    ends: list[dict[str, Any]]
    seconds: dict[str, float]
    size: int  # bytes of a checkpoint
    largest: int  # of a file in it

    @classmethod
    def of(cls, ranks: int) -> Untouched:
        with tempfile.TemporaryDirectory() as name:
            run = Run(Path(name), Path(name) / "run", ranks, keep=None)
            begun = time.perf_counter()
            run.start_and_end()
            taken = time.perf_counter() - begun
            folders = [run.output / f"checkpoint-{step}" for step in range(EVERY, STEPS + 1, EVERY)]
            sizes = [file.stat().st_size for file in folders[0].iterdir()]
            seconds = json.loads((run.home / "seconds-0.json").read_text()) | {"any": taken}
            contents = {step_of(folder): contents_of(folder) for folder in folders}
            return cls(contents, run.ends, seconds, sum(sizes), max(sizes))
