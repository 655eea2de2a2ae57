"""
Fine-tuning tasks: exercises of a prompt and a completion, some of them generated.

Generated functions have the form of HumanEval: a prompt, a body, and checks that run it.

    def sum_even_times_3(values):
        \"\"\"Return the sum of the values that are even, each times 3.\"\"\"
        return sum(x * 3 for x in values if x % 2 == 0)

A function has an end (a list, a sum, a count, ...), and may have a filter and a change. No two splits share a function.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_phibalance.tasks import TASKS, load_rows
from hf_phibalance.tasks.made import draw_problem


HELD_OUT = 128  # exercises of each task
CHECKS = 4  # calls that a generated function must answer


@dataclass(frozen=True)
class Exercise:
    """`reference` scores the answer: GSM8K's answer, or checks that call the function."""

    prompt: str
    completion: str
    reference: str = ""


@dataclass(frozen=True)
class Task:
    """Training and held-out exercises. Generated ones differ in their numbers or pieces between the two."""

    train: list[Exercise]
    held_out: list[Exercise]
    grade: str = ""  # "answer" (exact match by GSM8K's strict rule), "function" (pass@1), or none
    base: list[Exercise] = field(default_factory=list)  # similar exercises in the bases' training text


# ---------------------------------------------------------------------- generated functions


@dataclass(frozen=True)
class Piece:
    """A piece of a function: its part of the name, docstring and code, and what it computes."""

    name: str
    said: str
    code: str
    does: Callable[[Any], Any]


NO_CHANGE = Piece("", "", "", lambda x: x)
NO_FILTER = Piece("", "", "", lambda x: True)
FILTERS = (
    *(Piece(f"over_{n}", f"greater than {n}", f"x > {n}", lambda x, n=n: x > n) for n in range(1, 10)),
    *(Piece(f"under_{n}", f"less than {n}", f"x < {n}", lambda x, n=n: x < n) for n in range(1, 10)),
    *(
        Piece(f"multiples_of_{n}", f"divisible by {n}", f"x % {n} == 0", lambda x, n=n: x % n == 0)
        for n in range(3, 8)
    ),
    Piece("even", "even", "x % 2 == 0", lambda x: x % 2 == 0),
    Piece("odd", "odd", "x % 2 == 1", lambda x: x % 2 == 1),
)
CHANGES = (
    *(Piece(f"times_{n}", f"times {n}", f"x * {n}", lambda x, n=n: x * n) for n in range(2, 10)),
    *(Piece(f"plus_{n}", f"plus {n}", f"x + {n}", lambda x, n=n: x + n) for n in range(1, 10)),
    *(Piece(f"minus_{n}", f"minus {n}", f"x - {n}", lambda x, n=n: x - n) for n in range(1, 10)),
    Piece("squared", "squared", "x * x", lambda x: x * x),
    Piece("negated", "negated", "-x", lambda x: -x),
)
ENDS = (
    Piece("list", "a list of", "[{}]", list),
    Piece("sum", "the sum of", "sum({})", sum),
    Piece("largest", "the largest of", "max(({}), default=0)", lambda values: max(values, default=0)),
    Piece("smallest", "the smallest of", "min(({}), default=0)", lambda values: min(values, default=0)),
    Piece("sorted", "a sorted list of", "sorted({})", sorted),
    Piece("distinct", "the number of different numbers among", "len({{{}}})", lambda values: len(set(values))),
)


def draw_functions(count: int, pieces: int, seed: int, without: frozenset[str] = frozenset()) -> list[Exercise]:
    """Draws distinct functions with a filter or a change (`pieces` 1) or both (2). None has a prompt in `without`."""
    if pieces == 1:
        kinds = itertools.chain(itertools.product(FILTERS, (NO_CHANGE,)), itertools.product((NO_FILTER,), CHANGES))
    else:
        kinds = itertools.product(FILTERS, CHANGES)
    every = [(end, *kind) for end, kind in itertools.product(ENDS, kinds)]
    rng = random.Random(f"functions {seed}")
    rng.shuffle(every)
    free = [made for made in (_write(*parts, rng) for parts in every) if made.prompt not in without]
    if len(free) < count:
        raise ValueError(f"`count` is {count}, but only {len(free)} functions of {pieces} pieces are left.")
    return free[:count]


def _write(end: Piece, kept: Piece, change: Piece, rng: random.Random) -> Exercise:
    name = "_".join(piece.name for piece in (end, kept, change) if piece.name)
    said = f"Return {end.said} the values"
    said += f" that are {kept.said}" * bool(kept.said) + f", each {change.said}" * bool(change.said)
    code = end.code.format(f"{change.code or 'x'} for x in values" + f" if {kept.code}" * bool(kept.code))
    calls = [[rng.randint(-12, 24) for _ in range(rng.randint(3, 8))] for _ in range(CHECKS)]
    answers = [end.does([change.does(x) for x in values if kept.does(x)]) for values in calls]
    checks = "\n".join(f"assert {name}({values}) == {answer!r}" for values, answer in zip(calls, answers))
    return Exercise(f'def {name}(values):\n    """{said}."""\n', f"    return {code}\n", checks)


# ---------------------------------------------------------------------- tasks


def made_problems(count: int, templates: range, seed: int, without: frozenset[tuple[int, ...]] = frozenset()):
    """Draws distinct word problems from some templates. Returns them by key (template and numbers)."""
    rng, task = random.Random(f"problems {seed}"), TASKS["gsm8k"]
    drawn: dict[tuple[int, ...], Exercise] = {}
    while len(drawn) < count:
        problem = draw_problem(rng)
        if problem.key[0] in templates and problem.key not in without:
            row = {"question": problem.question, "answer": problem.answer}
            drawn.setdefault(problem.key, Exercise(task.prompt(row), task.completion(row), problem.answer))
    return drawn


def _problems(seen: range, tuned: range, seed: int) -> Task:
    held = made_problems(HELD_OUT, tuned, seed)
    train = made_problems(1500, tuned, seed + 1, frozenset(held))
    base = made_problems(1200, seen, seed + 2, frozenset(held) | frozenset(train))
    return Task(list(train.values()), list(held.values()), "answer", list(base.values()))


def near(data: Path | None) -> Task:
    """Word problems of templates that the base has seen."""
    return _problems(range(5), range(5), 100)


def far(data: Path | None) -> Task:
    """Word problems of templates that the base has not seen, most of three steps."""
    return _problems(range(5), range(5, 12), 200)


def functions(data: Path | None) -> Task:
    """Functions that filter and change. The base has seen functions that do one of the two."""
    held = draw_functions(HELD_OUT, 2, 0)
    train = draw_functions(1500, 2, 1, frozenset(exercise.prompt for exercise in held))
    return Task(train, held, "function", draw_functions(300, 1, 2))


def gsm8k(data: Path | None) -> Task:
    """GSM8K's training problems: half for the bases, half to tune on, some of that held out."""
    rows = load_rows("gsm8k", _folder(data, "gsm8k"), "train")
    random.Random("gsm8k").shuffle(rows)
    task = TASKS["gsm8k"]
    exercises = [Exercise(task.prompt(row), task.completion(row), row["answer"]) for row in rows]
    half = len(exercises) // 2
    return Task(exercises[half + HELD_OUT :], exercises[half : half + HELD_OUT], "answer", exercises[:half])


def mbpp(data: Path | None) -> Task:
    """MBPP's training and validation parts as functions. The bases have seen a third of the training part."""
    folder, task = _folder(data, "mbpp"), TASKS["mbpp"]
    train, validation = (
        [Exercise(task.prompt(row), task.completion(row)) for row in load_rows("mbpp", folder, split)]
        for split in ("train", "validation")
    )
    third = len(train) // 3
    return Task(train[third:], validation, base=train[:third])


def broad(data: Path | None) -> Task:
    """All other tasks at once."""
    parts = [make(data) for make in (near, far, functions, gsm8k, mbpp)]
    some = HELD_OUT // len(parts)
    return Task([e for part in parts for e in part.train], [e for part in parts for e in part.held_out[:some]])


def _folder(data: Path | None, name: str) -> str:
    if data is None or not (data / name).is_dir():
        raise FileNotFoundError(f"the task {name!r} needs --data, a folder that holds {name}/; the made tasks do not.")
    return str(data / name)


EXERCISES: dict[str, Callable[[Path | None], Task]] = {
    task.__name__: task for task in (near, far, functions, gsm8k, mbpp, broad)
}
MADE = ("near", "far", "functions")  # these need no data
