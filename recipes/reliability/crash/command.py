"""The command line."""

from __future__ import annotations

import argparse
import json
import logging as python_logging
import random
from pathlib import Path

import torch
from transformers.utils import logging

from hf_phibalance.files import versions

from .disk import Disk
from .killing import Tally, kill_runs
from .runs import Untouched
from .traps import MOMENTS


HEAD = (
    "| moment | ranks | kills | newest checkpoint unfinished | file it ends with | runs | identical in the end |",
    "|---|--:|--:|--:|---|--:|--:|",
)


def row(tally: Tally) -> str:
    files = ", ".join(f"{name} {count}" for name, count in tally.last_files.most_common())
    cells = (tally.moment, tally.ranks, tally.kills, tally.unfinished, files, tally.runs, tally.identical)
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kills training runs and resumes them.")
    parser.add_argument("--kills", type=int, default=50, help="of each moment and number of ranks (50)")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # threads do not survive a fork
    logging.set_verbosity_error()  # what is passed over is counted instead
    python_logging.getLogger("hf_phibalance").setLevel(python_logging.ERROR)
    disk, rng, tallies = Disk(), random.Random(options.seed), []
    if "disk" in options.moments and disk.refusal:
        print(f"no small disk ({disk.refusal}): a limit to the size of files stands in for it")
    for ranks in options.ranks:
        untouched = Untouched.of(ranks)
        seconds = ", ".join(f"{what} {taken:.3f} s" for what, taken in untouched.seconds.items())
        print(f"{ranks} rank(s), untouched: {seconds}; {untouched.size:,} bytes a checkpoint", flush=True)
        for moment in options.moments:
            tallies.append(kill_runs(moment, ranks, options.kills, untouched, disk, rng))
            print(row(tallies[-1]), *tallies[-1].faults, sep="\n  ", flush=True)
    print(
        "",
        *HEAD,
        *map(row, tallies),
        "",
        ", ".join(f"{name} {number}" for name, number in versions().items()),
        sep="\n",
    )
    if options.json:
        options.json.write_text(json.dumps([vars(tally) for tally in tallies], indent=2) + "\n")
    return int(any(tally.faults for tally in tallies))
