"""Killing runs again and again, and looking at what is left each time and in the end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from .checks import difference
from .disk import Disk
from .runs import Run, Untouched
from .training import STEPS, contents_of, step_of
from .traps import Trap


KILLS_OF_A_RUN = 3
DISK_ERRORS = (
    "No space left",
    "File too large",
    "file write failed",
    "enforce fail",
)  # as safetensors and torch say it


@dataclass
class Tally:
    """What came of killing runs of `ranks` processes at `moment`."""

    moment: str
    ranks: int
    kills: int = 0
    unfinished: int = 0  # of the kills: the newest checkpoint by number was not whole
    runs: int = 0
    identical: int = 0  # of the runs: ended as the untouched one
    last_files: Counter[str] = field(default_factory=Counter)  # that were begun in those
    faults: list[str] = field(default_factory=list)


def kill_runs(moment: str, ranks: int, kills: int, untouched: Untouched, disk: Disk, rng: random.Random) -> Tally:
    """Kills runs until there were `kills`, each up to three times before it is left to its end."""
    tally = Tally(moment, ranks)
    while tally.kills < kills:
        with tempfile.TemporaryDirectory() as name, disk.under(Path(name), moment, untouched.size * 4) as place:
            run = Run(Path(name), place / "run", ranks)
            tally.runs += 1
            try:
                for _ in range(min(KILLS_OF_A_RUN, kills - tally.kills)):
                    before = run.newest
                    if before == STEPS or not kill(run, moment, untouched, disk, rng):
                        break
                    tally.kills += 1
                    check_checkpoints(run, before, untouched, tally)
                run.start_and_end()
            except RuntimeError as error:  # it could not be started again
                tally.faults.append(str(error))
                return tally
            if fault := difference(run.ends, untouched.ends):
                tally.faults.append(f"in the end {fault}")
            else:
                tally.identical += 1
    return tally


def kill(run: Run, moment: str, untouched: Untouched, disk: Disk, rng: random.Random) -> bool:
    """Lets `run` die at `moment`. Returns whether it did; a disk may turn out large enough."""
    victim = 0 if moment in ("state", "disk") else rng.randrange(run.ranks)  # rank 0 writes the duals
    reader, writer = os.pipe()
    trap = Trap(moment, rng.getrandbits(32), reader, writer)
    room = rng.randrange(untouched.size * (1 if run.newest else 2))
    if moment == "disk" and disk.refusal:
        trap.file_limit = rng.randrange(untouched.largest)
    delay, others = rng.random() * untouched.seconds.get(moment, 0.0), rng.random() * 0.02
    try:
        with disk.filled_up_to(run.output.parent, room) if moment == "disk" else contextlib.nullcontext():
            codes = run.start(trap, victim, delay, others)
    finally:
        os.close(reader)
        os.close(writer)
    if moment == "disk" and not any(codes):
        return False
    by_disk = any(error in run.log for error in DISK_ERRORS)
    if not (by_disk if moment == "disk" else codes[victim] == -signal.SIGKILL):
        raise RuntimeError(
            f"a run whose rank {victim} was to die at {moment!r} ended with {codes}:\n{run.log[-3000:]}"
        )
    return True


def check_checkpoints(run: Run, before: int, untouched: Untouched, tally: Tally) -> None:
    """Notes whether the newest checkpoint is whole, what the untouched run wrote, and no older than `before`."""
    theirs = get_last_checkpoint(run.output) if run.output.is_dir() else None
    newest = run.newest
    if theirs is not None and step_of(theirs) != newest:
        tally.unfinished += 1
        files = sorted(Path(theirs).iterdir(), key=lambda file: file.stat().st_mtime_ns)
        tally.last_files[files[-1].name if files else "none"] += 1
    if newest < before:
        tally.faults.append(f"after a kill the newest complete checkpoint is {newest}, it was {before}")
    if newest:
        try:
            fault = difference(contents_of(run.output / f"checkpoint-{newest}"), untouched.checkpoints[newest])
        except Exception as error:
            fault = f"unreadable: {error!r}"
        if fault:
            tally.faults.append(f"checkpoint-{newest}, called complete: {fault}")
