"""The tasks that are fine-tuned on: exercises of a prompt and a completion, some held out, some of them to be graded."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hf_phibalance.tasks import TASKS, load_rows
from hf_phibalance.tasks.made import draw_problem

from .functions import draw_functions


HELD_OUT = 128  # exercises of each task
GRADED = 96  # of them, whose answers are written by the model and scored


@dataclass(frozen=True)
class Exercise:
    """
    Args:
        prompt (`str`): What the model is given.
        completion (`str`): What it shall write.
        reference (`str`): What its answer is scored by: GSM8K's answer, or checks that call the function.
    """

    prompt: str
    completion: str
    reference: str = ""


@dataclass(frozen=True)
class Task:
    """
    Args:
        train, held_out (`list[Exercise]`): The two parts; made exercises of different numbers or pieces.
        grade (`str`): `"answer"` (exact match, GSM8K's strict rule), `"function"` (pass@1) or `""` (loss only).
        base (`list[Exercise]`): What the bases saw of its kind, in their text.
    """

    train: list[Exercise]
    held_out: list[Exercise]
    grade: str
    base: list[Exercise]


def made_problems(count: int, templates: range, seed: int, without: frozenset[tuple[int, ...]] = frozenset()):
    """Different made problems of some templates, by their keys (template and numbers)."""
    rng = random.Random(f"problems {seed}")
    drawn: dict[tuple[int, ...], Exercise] = {}
    while len(drawn) < count:
        problem = draw_problem(rng)
        if problem.key[0] in templates and problem.key not in without:
            task = TASKS["gsm8k"]
            row = {"question": problem.question, "answer": problem.answer}
            drawn.setdefault(problem.key, Exercise(task.prompt(row), task.completion(row), problem.answer))
    return drawn


def _problems(seen: range, tuned: range, seed: int) -> Task:
    held = made_problems(HELD_OUT, tuned, seed)
    train = made_problems(1500, tuned, seed + 1, frozenset(held))
    base = made_problems(1200, seen, seed + 2, frozenset(held) | frozenset(train))
    return Task(list(train.values()), list(held.values()), "answer", list(base.values()))


def near(data: Path | None) -> Task:
    """Problems of kinds that the base has seen."""
    return _problems(range(5), range(5), 100)


def far(data: Path | None) -> Task:
    """Problems of kinds that the base has not seen, most of three steps."""
    return _problems(range(5), range(5, 12), 200)


def functions(data: Path | None) -> Task:
    """Functions that filter and change, where the base has seen functions that do one of the two."""

    def exercises(rows: list[dict[str, str]]) -> list[Exercise]:
        return [Exercise(row["prompt"], row["body"], row["checks"]) for row in rows]

    held = draw_functions(HELD_OUT, 2, 0)
    train = draw_functions(1500, 2, 1, frozenset(row["name"] for row in held))
    return Task(exercises(train), exercises(held), "function", exercises(draw_functions(300, 1, 2)))


def gsm8k(data: Path | None) -> Task:
    """GSM8K's training problems: half for the bases, half to tune on, and of that some held out."""
    rows = load_rows("gsm8k", str(_needed(data, "gsm8k")), "train")
    random.Random("gsm8k").shuffle(rows)
    task = TASKS["gsm8k"]
    exercises = [Exercise(task.prompt(row), task.completion(row), row["answer"]) for row in rows]
    half = len(exercises) // 2
    return Task(exercises[half + HELD_OUT :], exercises[half : half + HELD_OUT], "answer", exercises[:half])


def mbpp(data: Path | None) -> Task:
    """MBPP's training and validation parts as functions; the bases have seen a third of the former."""
    folder, task = str(_needed(data, "mbpp")), TASKS["mbpp"]
    parts = {split: load_rows("mbpp", folder, split) for split in ("train", "validation")}
    written = {
        split: [Exercise(task.prompt(row), task.completion(row)) for row in rows] for split, rows in parts.items()
    }
    third = len(written["train"]) // 3
    return Task(written["train"][third:], written["validation"], "", written["train"][:third])


def broad(data: Path | None) -> Task:
    """All of the others at once, as much of each as there is; the bases have seen what they saw of those."""
    parts = [make(data) for make in (near, far, functions, gsm8k, mbpp)]
    some = HELD_OUT // len(parts)
    return Task([e for part in parts for e in part.train], [e for part in parts for e in part.held_out[:some]], "", [])


def _needed(data: Path | None, name: str) -> Path:
    if data is None or not (data / name).is_dir():
        raise FileNotFoundError(f"the task {name!r} needs --data, a folder that holds {name}/; the made tasks do not.")
    return data / name


EXERCISES: dict[str, Callable[[Path | None], Task]] = {
    task.__name__: task for task in (near, far, functions, gsm8k, mbpp, broad)
}
MADE = ("near", "far", "functions")  # which need no data
