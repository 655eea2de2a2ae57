"""
Generates word problems in the format of GSM8K.

A problem needs two or three steps of arithmetic. As in GSM8K, the answer shows the calculation of every step in
`<<...>>` and the result after `####`:

    Question: Mia buys 4 boxes of pens with 6 pens in each box. She gives 9 pens to Leo. How many pens ...
    Answer: Mia buys 4*6=<<4*6=24>>24 pens.
    Mia has 24-9=<<24-9=15>>15 pens left.
    #### 15

No held-out problem has both the template and the numbers of a training problem. A model that solves held-out problems
has learned arithmetic, not texts.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple


NAMES = ("Mia", "Leo", "Emma", "Noah", "Anna", "Ben", "Zoe", "Sam", "Ruth", "Omar", "Ines", "Paul", "Lily", "Hugo")
ITEMS = ("apples", "pens", "books", "cards", "shells", "coins", "stamps", "pears", "eggs", "marbles", "plums")
PLACES = ("garden", "market", "school", "farm", "shop", "library", "park", "kitchen")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MAX_NUMBER = 50  # largest result of a calculation
MAX_ADDEND = 9  # limit of the smaller term of a sum, and of a number to subtract


class Template(NamedTuple):
    """
    One kind of problem.

    Args:
        question (`str`): Text with fields for words (`{name}`, `{items}`, ...) and numbers (`{a}`, `{b}`, ...).
        answer (`str`): One step a line, each with one calculation. `[t=a*b]` is written as `4*6=<<4*6=24>>24`, and
            `[$t=a*b]` as `4*6=$<<4*6=24>>24`. The last result, `r`, is the answer.
        numbers (`dict[str, tuple[int, int]]`): Smallest and largest value of each number. A draw is repeated if a
            result is not a whole number from 1 to `MAX_NUMBER`.
    """

    question: str
    answer: str
    numbers: dict[str, tuple[int, int]]


class Problem(NamedTuple):
    """A question, its answer in GSM8K's format, and the key (template and numbers) that keeps the splits apart."""

    question: str
    answer: str
    key: tuple[int, ...]


_CALCULATION = re.compile(r"\[(\$?)(\w)=(\w+)([-+*/])(\w+)\]")

TEMPLATES: tuple[Template, ...] = (
    Template(
        "{name} buys {a} boxes of {items} with {b} {items} in each box. {name} gives {c} {items} to {friend}. "
        "How many {items} does {name} have left?",
        "{name} buys [t=a*b] {items}.\n{name} has [r=t-c] {items} left.",
        {"a": (2, 9), "b": (2, 9), "c": (2, 40)},
    ),
    Template(
        "{name} buys {a} {items} for ${b} each at the {place} and gets ${c} off. How much does {name} pay?",
        "The {items} cost [$t=a*b].\n{name} pays [$r=t-c].",
        {"a": (2, 9), "b": (2, 9), "c": (2, 12)},
    ),
    Template(
        "{name} has {a} {items} and {friend} has {b} {items}. They share all of them equally among {c} "
        "children in the {place}. How many {items} does each child get?",
        "Together they have [t=a+b] {items}.\nEach child gets [r=t/c] {items}.",
        {"a": (2, 40), "b": (2, 40), "c": (2, 9)},
    ),
    Template(
        "{name} has {a} {items}. {friend} has {b} more {items} than {name}, and {third} has {c} fewer {items} "
        "than {friend}. How many {items} does {third} have?",
        "{friend} has [t=a+b] {items}.\n{third} has [r=t-c] {items}.",
        {"a": (2, 60), "b": (2, 30), "c": (2, 30)},
    ),
    Template(
        "{name} earns ${a} an hour at the {place}. {name} works {b} hours on {day} and {c} hours on {day2}. "
        "How much does {name} earn?",
        "{name} works [t=b+c] hours.\n{name} earns [$r=a*t].",
        {"a": (2, 9), "b": (2, 8), "c": (2, 8)},
    ),
    Template(
        "{name} reads {a} pages of a book a day for {b} days and another {c} pages on {day}. How many pages "
        "does {name} read altogether?",
        "{name} reads [t=a*b] pages.\nAltogether it is [r=t+c] pages.",
        {"a": (2, 9), "b": (2, 9), "c": (2, 12)},
    ),
    Template(
        "{name} has {a} {items} and {friend} has half as many. {third} has {b} more {items} than {friend} and "
        "gives {c} of them away. How many {items} does {third} have now?",
        "{friend} has [t=a/2] {items}.\n{third} has [u=t+b] {items}.\nNow {third} has [r=u-c] {items}.",
        {"a": (4, 60), "b": (2, 9), "c": (2, 9)},
    ),
    Template(
        "{name} packs {a} bags with {b} {items} each and {friend} packs {c} bags with {d} {items} each. How "
        "many {items} do they pack in total?",
        "{name} packs [t=a*b] {items}.\n{friend} packs [u=c*d] {items}.\nIn total they pack [r=t+u] {items}.",
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9)},
    ),
    Template(
        "{name} has {a} boxes with {b} {items} each. {c} {items} get lost in the {place}. {name} shares the "
        "rest equally among {d} friends. How many {items} does each friend get?",
        "{name} has [t=a*b] {items}.\nAfter that [u=t-c] {items} are left.\nEach friend gets [r=u/d] {items}.",
        {"a": (2, 9), "b": (2, 9), "c": (1, 20), "d": (2, 9)},
    ),
    Template(
        "On {day} {name} picks {a} {items} in the morning and {b} {items} in the afternoon. {c} {items} are "
        "bad. The rest is put into bags of {d}. How many bags does {name} fill?",
        "{name} picks [t=a+b] {items}.\nOf these [u=t-c] {items} are good.\n{name} fills [r=u/d] bags.",
        {"a": (5, 40), "b": (5, 40), "c": (1, 20), "d": (2, 9)},
    ),
    Template(
        "{name} saves ${a} a week for {b} weeks. {friend} gives {name} another ${c}. Then {name} spends ${d} "
        "on {items}. How much money does {name} have now?",
        "{name} saves [$t=a*b].\nWith the money from {friend} it is [$u=t+c].\nNow {name} has [$r=u-d].",
        {"a": (2, 9), "b": (2, 9), "c": (2, 20), "d": (2, 30)},
    ),
    Template(
        "{name} has {a} {items} and finds {b} more in the {place} on {day}. {friend} has twice as many {items} "
        "as {name} has now. How many {items} does {friend} have?",
        "{name} has [t=a+b] {items} now.\n{friend} has [r=t*2] {items}.",
        {"a": (2, 30), "b": (2, 30)},
    ),
)


def draw_problem(rng: random.Random) -> Problem:
    """Draws a template, its words, and numbers for which every result is a whole number."""
    index = rng.randrange(len(TEMPLATES))
    question, steps, ranges = TEMPLATES[index]
    answer = None
    while answer is None:
        values = {key: rng.randint(low, high) for key, (low, high) in ranges.items()}
        numbers = tuple(values.values())
        answer = _calculate(steps, values)
    name, friend, third = rng.sample(NAMES, 3)
    day, day2 = rng.sample(DAYS, 2)
    words = {"name": name, "friend": friend, "third": third, "day": day, "day2": day2}
    words |= {"items": rng.choice(ITEMS), "place": rng.choice(PLACES)}
    return Problem(
        question.format(**words, **values), f"{answer.format(**words)}\n#### {values['r']}", (index, *numbers)
    )


def _calculate(steps: str, values: dict[str, int]) -> str | None:
    """Writes the calculations into `steps`, the results into `values`. Returns `None` if a number breaks a limit."""
    for dollar, target, left, operator, right in _CALCULATION.findall(steps):
        x, y = (int(term) if term.isdigit() else values[term] for term in (left, right))
        if operator == "/" and x % y:
            return None
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
        if (operator == "+" and min(x, y) > MAX_ADDEND) or (operator == "-" and y > MAX_ADDEND):
            return None
        if not 1 <= result <= MAX_NUMBER:
            return None
        values[target] = result
        steps = _CALCULATION.sub(f"{x}{operator}{y}={dollar}<<{x}{operator}{y}={result}>>{result}", steps, count=1)
    return steps


def make_splits(train: int, validation: int = 0, test: int = 0, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """
    Generates splits of distinct problems. No two splits share a template with the same numbers.

    The test split is drawn first, so it does not depend on the sizes of the others.

    Args:
        train (`int`): Number of training problems.
        validation (`int`, *optional*, defaults to 0): Number of problems for tuning.
        test (`int`, *optional*, defaults to 0): Number of held-out problems.
        seed (`int`, *optional*, defaults to 0): Seed of the generator.

    Returns:
        `dict[str, list[dict[str, str]]]`: The splits `"train"`, `"validation"` and `"test"`, each a list of
        `{"question": ..., "answer": ...}`.
    """
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, str]]] = {}
    other_keys: set[tuple[int, ...]] = set()
    for split, size in {"test": test, "validation": validation, "train": train}.items():
        problems: dict[str, Problem] = {}
        for _ in range(100 * size):
            if len(problems) == size:
                break
            problem = draw_problem(rng)
            if problem.key not in other_keys:
                problems.setdefault(problem.question, problem)
        if len(problems) < size:
            raise ValueError(f"{split}={size} is more than the generator has: ask for at most {len(problems)}")
        other_keys |= {problem.key for problem in problems.values()}
        splits[split] = [{"question": problem.question, "answer": problem.answer} for problem in problems.values()]
    return splits
