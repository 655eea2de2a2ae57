"""Made functions over a list of numbers, in the form of HumanEval: a prompt, a body, and checks that run it.

    def sum_even_times_3(values):
        \"\"\"Return the sum of the values that are even, each times 3.\"\"\"
        return sum(x * 3 for x in values if x % 2 == 0)

A function has an end (a list, a sum, a count, ...), and may have a filter and a change; how many of the two it has is its
difficulty. No two splits share a function.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Piece:
    """One piece of a function: in its name, in its docstring, in its code, and what it does."""

    name: str
    said: str
    code: str
    does: Callable[[Any], Any]


NOTHING = Piece("", "", "", lambda x: x)
ANY = Piece("", "", "", lambda x: True)
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
CHECKS = 4  # calls that a body must answer


def draw_functions(count: int, pieces: int, seed: int, without: frozenset[str] = frozenset()) -> list[dict[str, str]]:
    """
    Different functions, each `{"name", "prompt", "body", "checks"}`.

    Args:
        count (`int`): How many.
        pieces (`int`): 1 for functions that filter or change, 2 for those that do both.
        seed (`int`): Seed of the draw.
        without (`frozenset[str]`): Names that are taken.

    Raises:
        ValueError: if there are not so many.
    """
    if pieces == 1:
        kinds = itertools.chain(itertools.product(FILTERS, (NOTHING,)), itertools.product((ANY,), CHANGES))
    else:
        kinds = itertools.product(FILTERS, CHANGES)
    every = [(end, *kind) for end, kind in itertools.product(ENDS, kinds)]
    rng = random.Random(f"functions {seed}")
    rng.shuffle(every)
    free = [row for row in (_write(*parts, rng) for parts in every) if row["name"] not in without]
    if len(free) < count:
        raise ValueError(f"`count` is {count}, but only {len(free)} functions of {pieces} pieces are left.")
    return free[:count]


def _write(end: Piece, kept: Piece, change: Piece, rng: random.Random) -> dict[str, str]:
    name = "_".join(piece.name for piece in (end, kept, change) if piece.name)
    said = f"Return {end.said} the values"
    said += f" that are {kept.said}" * bool(kept.said) + f", each {change.said}" * bool(change.said)
    code = end.code.format(f"{change.code or 'x'} for x in values" + f" if {kept.code}" * bool(kept.code))
    calls = [[rng.randint(-12, 24) for _ in range(rng.randint(3, 8))] for _ in range(CHECKS)]
    answers = [end.does([change.does(x) for x in values if kept.does(x)]) for values in calls]
    checks = "\n".join(f"assert {name}({values}) == {answer!r}" for values, answer in zip(calls, answers))
    return {
        "name": name,
        "prompt": f'def {name}(values):\n    """{said}."""\n',
        "body": f"    return {code}\n",
        "checks": checks,
    }
