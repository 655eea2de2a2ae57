"""
Kills training runs and resumes them: do they end as the run that nobody touched, bit for bit?

    python tests/helpers/crash.py
    python tests/helpers/crash.py --kills 5 --moments checkpoint state --ranks 2

A tiny Mixtral with dropout, both levers on, six steps of two micro-batches, a checkpoint every second step of which the last is
kept (`save_total_limit=1`). A run is killed up to three times, resumed from the newest complete checkpoint each time, and then
left to its end. The moments:

    forward, backward   in a module, for a parameter, of a step drawn at random
    update              the optimizer has stepped, the duals have not
    checkpoint          at a random time after the writing of a checkpoint began; rotation is within
    state               at a random time after the writing of the duals' file began
    any                 at a random time after the process was started, resuming included
    disk                no kill: the disk is full after a random number of bytes, and the run dies of that

Kills are SIGKILL; of two ranks one is killed, the other at most 20 ms later. After each kill the newest complete checkpoint must
hold what the untouched run wrote at that step (weights, optimizer, schedule, random states, duals), and be no older than the one
before. *Unfinished* counts the kills after which `transformers` alone would have resumed from an incomplete one. In the end
weights, optimizer, duals, prices and random states must be those of the untouched run.

Linux, no network, about half an hour on 2 CPU cores. Exits with 1 if anything was lost or differs.
"""

from __future__ import annotations

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork

import argparse
import contextlib
import json
import logging as python_logging
import multiprocessing
import multiprocessing.connection
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_phibalance import attach, get_balancer, last_checkpoint, patch  # lazy imports, done here once for all forks
from hf_phibalance.files import STATE_NAME, replace_unprintable, versions


MOMENTS = ("forward", "backward", "update", "checkpoint", "state", "any", "disk")
MODULES = ("self_attn", "mlp", "mlp.gate", "mlp.experts", "input_layernorm", "post_attention_layernorm")
KILLS_OF_A_RUN = 3
STEPS, EVERY, ACCUMULATION, VOCAB = 6, 2, 2, 512
DEADLINE = 300  # seconds, for anything to happen
DISK_ERRORS = ("No space left", "File too large", "file write failed", "enforce fail")  # of safetensors and torch too
FORK = multiprocessing.get_context("fork")  # imported once here instead of in each of a thousand processes
FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "attention_dropout": 0.1,
}


# ---------------------------------------------------------------------- how a run dies


@dataclass
class Trap:
    """
    Args:
        moment (`str`): One of `MOMENTS`.
        seed (`int`): Seed for the random choices (the step, the module, ...).
        told (`int`), tell (`int`): Ends of the pipe that tells a killing parent to begin its delay.
        file_limit (`int`, *optional*): Largest size of a file in bytes.
    """

    moment: str
    seed: int
    told: int
    tell: int
    file_limit: int | None = None

    @property
    def by_parent(self) -> bool:
        return self.moment in ("checkpoint", "state", "any")

    def set(self, trainer: Trainer, done: int) -> None:
        """Arms `trainer`, which resumes after `done` steps."""
        rng, left = random.Random(self.seed), STEPS - done
        model: Any = trainer.model
        if self.moment == "forward":
            layer = rng.choice(model.model.layers)
            after = countdown(rng.randint(1, left * ACCUMULATION))
            layer.get_submodule(rng.choice(MODULES)).register_forward_hook(lambda *_: after())
        elif self.moment == "backward":
            after = countdown(rng.randint(1, left * ACCUMULATION))
            rng.choice(list(model.parameters())).register_hook(lambda _: after())
        elif self.moment == "update":
            after = countdown(rng.randint(1, left))
            trainer.create_optimizer().register_step_post_hook(lambda *_: after())
        elif self.moment in ("checkpoint", "state"):
            call = countdown(rng.randint(1, left // EVERY), lambda: os.write(self.tell, b"."))
            before_calls(*writer_of(trainer, self.moment), call)
        elif self.file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_limit, resource.RLIM_INFINITY))


def countdown(calls: int, action: Callable[[], Any] = lambda: os.kill(os.getpid(), signal.SIGKILL)) -> Callable:
    """Returns a function that runs `action` at its `calls`-th call."""
    left = iter(range(calls - 1, -1, -1))

    def count() -> None:
        if next(left, None) == 0:
            action()

    return count


def writer_of(trainer: Trainer, what: str) -> tuple[Any, str]:
    """Returns the owner and the name of the method that writes a checkpoint or the duals."""
    return (trainer, "_save_checkpoint") if what == "checkpoint" else (get_balancer(trainer.model), "save")


def before_calls(owner: Any, name: str, before: Callable[[], None]) -> None:
    method = getattr(owner, name)

    def call(*args, **kwargs):
        before()
        return method(*args, **kwargs)

    setattr(owner, name, call)


class Disk:
    """A small file system in memory if it can be mounted, otherwise a limit on the size of files."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            self.is_there = _mount(Path(name), 2**20)
            if self.is_there:
                subprocess.run(["umount", name], check=True)

    @contextlib.contextmanager
    def under(self, home: Path, moment: str, size: int) -> Iterator[Path]:
        """Yields the folder that a run writes to: a disk of `size` bytes for the moment `"disk"`, otherwise `home`."""
        if moment != "disk" or not self.is_there:
            yield home
            return
        place = home / "disk"
        place.mkdir()
        _mount(place, size)
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)

    @contextlib.contextmanager
    def filled_up_to(self, place: Path, room: int) -> Iterator[None]:
        """Context manager: leaves `room` bytes on the disk."""
        if not self.is_there:
            yield
            return
        ballast, free = place / "ballast", os.statvfs(place)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - room, 1))
        try:
            yield
        finally:
            ballast.unlink()


def _mount(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


# ---------------------------------------------------------------------- the run, in processes of its own


def rows(count: int = 80) -> list[dict[str, list[int]]]:
    """Returns token sequences of unequal lengths. Low token ids are more frequent, so that loads are uneven."""
    rng = random.Random(0)
    drawn = [[int(VOCAB * rng.random() ** 2) for _ in range(rng.randint(4, 24))] for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": padded, "attention_mask": mask, "labels": padded.masked_fill(mask == 0, -100)}


def build_trainer(folder: Path, seed: int, keep: int | None) -> Trainer:
    """Returns an attached trainer that writes into `folder`. `seed`: for weights that a checkpoint must overwrite."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(MixtralConfig(**FIELDS))
    patch(model, {"coef": 0.5, "bias_coef": 0.05})
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=0.01,
        save_steps=EVERY,
        save_total_limit=keep,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_find_unused_parameters=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(), data_collator=collate)
    attach(trainer)
    return trainer


def train(output: Path, home: Path, rank: int, ranks: int, port: int, trap: Trap | None, keep: int | None) -> None:
    """Starts the run in `output`, or resumes it, and writes its final state to `home`."""
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        newest = last_checkpoint(output)
        trainer = build_trainer(output, seed=0 if newest is None else 1, keep=keep)
        seconds = (
            time_writing(trainer) if trap is None else trap.set(trainer, 0 if newest is None else step_of(newest))
        )
        trainer.train(resume_from_checkpoint=newest is not None)
        torch.save(outcome(trainer), home / f"end-{rank}.pt")
        (home / f"seconds-{rank}.json").write_text(json.dumps(seconds))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    if trap is not None and trap.by_parent:
        signal.pause()  # wait for the kill
    os._exit(0)  # like a kill: skips all clean-up


def outcome(trainer: Trainer) -> dict[str, Any]:
    balancer = get_balancer(trainer.model)
    return {
        "step": trainer.state.global_step,
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "schedule": trainer.lr_scheduler.state_dict(),
        "duals": balancer.state_dict(),
        "prices": balancer.prices(),
        "random": [torch.random.get_rng_state(), np.random.get_state(), random.getstate()],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def time_writing(trainer: Trainer) -> dict[str, float]:
    """Returns a dict, filled later, of the longest times of writing a checkpoint and the duals: bounds of delays."""
    seconds = {"checkpoint": 0.0, "state": 0.0}

    def timed(what: str, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def call(*args, **kwargs):
            begun = time.perf_counter()
            method(*args, **kwargs)
            seconds[what] = max(time.perf_counter() - begun, seconds[what])

        setattr(owner, name, call)

    for what in seconds:
        timed(what, *writer_of(trainer, what))
    return seconds


@dataclass
class Run:
    """A run of `ranks` processes that may die and restart. `output` is its output folder, `home` is ours."""

    home: Path
    output: Path
    ranks: int
    keep: int | None = 1

    @property
    def log(self) -> str:
        return (self.home / "log").read_text(errors="replace")

    @property
    def newest(self) -> int:
        """The step that the run would resume from."""
        newest = last_checkpoint(self.output)
        return 0 if newest is None else step_of(newest)

    @property
    def ends(self) -> list[dict[str, Any]]:
        return [torch.load(self.home / f"end-{rank}.pt", weights_only=False) for rank in range(self.ranks)]

    def start(self, trap: Trap | None = None, victim: int = 0, delay: float = 0.0, others: float = 0.0) -> list[int]:
        """
        Starts the run and lets `trap` kill the rank `victim`. If the parent kills, it does so `delay` seconds after
        the trap tells it. The other rank is killed `others` seconds after the first death. Returns all exit codes.
        """
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
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
        codes = self.start()
        if any(codes):
            raise RuntimeError(f"a run that nobody touched ended with exit codes {codes}:\n{self.log[-3000:]}")


def wait(objects: list[Any]) -> None:
    if not multiprocessing.connection.wait(objects, DEADLINE):
        raise TimeoutError(f"nothing happened for {DEADLINE} s")


def step_of(checkpoint: str | Path) -> int:
    return int(str(checkpoint).rpartition("-")[2])


def contents_of(checkpoint: Path) -> dict[str, Any]:
    """Returns everything that a run resumes from, by file."""
    tensors = [*checkpoint.glob("*.safetensors"), checkpoint / STATE_NAME]
    contents: dict[str, Any] = {path.name: load_file(path) for path in tensors}
    for path in checkpoint.glob("*.pt*"):  # .pt and .pth
        contents[path.name] = torch.load(path, weights_only=False)
    return contents | {"step": json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]}


def difference(left: Any, right: Any, where: str = "") -> str | None:
    """Returns where two nested values first differ in a bit; `None` if they are equal."""
    if type(left) is not type(right):
        return f"{where} differs in type"
    if isinstance(left, (list, tuple)):
        left, right = dict(enumerate(left)), dict(enumerate(right))
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return f"{where} differs in names, {sorted(map(str, left.keys() ^ right.keys()))}"
        found = (difference(left[name], right[name], f"{where}/{name}") for name in left)
        return next(filter(None, found), None)
    if isinstance(left, torch.Tensor):
        equal = left.dtype == right.dtype and torch.equal(left, right)
    else:
        equal = np.array_equal(left, right) if isinstance(left, np.ndarray) else left == right
    return None if equal else f"{where} differs"


@dataclass
class Untouched:
    """The checkpoints, final state and timings of a run that is never killed."""

    checkpoints: dict[int, dict[str, Any]]
    ends: list[dict[str, Any]]
    seconds: dict[str, float]
    size: int  # of a checkpoint, in bytes
    largest: int  # of a file in it, in bytes

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


# ---------------------------------------------------------------------- killing again and again


@dataclass
class Tally:
    """The outcome of killing runs of `ranks` processes at `moment`."""

    moment: str
    ranks: int
    kills: int = 0
    unfinished: int = 0  # kills after which the newest checkpoint by number was incomplete
    runs: int = 0
    identical: int = 0  # runs that ended like the untouched one
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cells = (self.moment, self.ranks, self.kills, self.unfinished, self.runs, self.identical)
        return f"| {' | '.join(map(str, cells))} |"


def kill_runs(moment: str, ranks: int, kills: int, untouched: Untouched, disk: Disk, rng: random.Random) -> Tally:
    """Kills runs until `kills` is reached. Kills each run up to three times, then lets it finish."""
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
            except RuntimeError as error:  # it could not restart
                tally.faults.append(str(error))
                return tally
            if fault := difference(run.ends, untouched.ends):
                tally.faults.append(f"in the end {fault}")
            else:
                tally.identical += 1
    return tally


def kill(run: Run, moment: str, untouched: Untouched, disk: Disk, rng: random.Random) -> bool:
    """Lets `run` die at `moment`. Returns whether it died, since a full disk may turn out large enough."""
    victim = 0 if moment in ("state", "disk") else rng.randrange(run.ranks)  # rank 0 writes the duals
    reader, writer = os.pipe()
    trap = Trap(moment, rng.getrandbits(32), reader, writer)
    room = rng.randrange(untouched.size * (1 if run.newest else 2))
    if moment == "disk" and not disk.is_there:
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
    """Checks that the newest checkpoint is complete, equals the untouched run's, and is no older than `before`."""
    theirs = get_last_checkpoint(run.output) if run.output.is_dir() else None
    newest = run.newest
    tally.unfinished += theirs is not None and step_of(theirs) != newest
    if newest < before:
        tally.faults.append(f"after a kill the newest complete checkpoint is {newest}, it was {before}")
    if newest:
        try:
            fault = difference(contents_of(run.output / f"checkpoint-{newest}"), untouched.checkpoints[newest])
        except Exception as error:
            fault = f"unreadable: {error!r}"
        if fault:
            tally.faults.append(f"checkpoint-{newest}, called complete: {fault}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each moment and number of ranks (50)")
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS)
    parser.add_argument("--ranks", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # skipped checkpoints are counted instead
    python_logging.getLogger("hf_phibalance").setLevel(python_logging.ERROR)
    disk, rng, tallies = Disk(), random.Random(options.seed), []
    if "disk" in options.moments and not disk.is_there:
        print("a small disk cannot be mounted: a limit to the size of files stands in for it")
    for ranks in options.ranks:
        untouched = Untouched.of(ranks)
        for moment in options.moments:
            tallies.append(kill_runs(moment, ranks, options.kills, untouched, disk, rng))
            print(tallies[-1], *tallies[-1].faults, sep="\n  ", flush=True)
    print("\n| moment | ranks | kills | unfinished | runs | identical |\n|---|--:|--:|--:|--:|--:|")
    print(*tallies, "", ", ".join(f"{name} {number}" for name, number in versions().items()), sep="\n")
    if options.json:
        options.json.write_text(json.dumps([vars(tally) for tally in tallies], indent=2) + "\n")
    return int(any(tally.faults for tally in tallies))


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
