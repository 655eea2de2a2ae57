"""Made problems: word problems in the format of GSM8K, generated on the spot.

A problem needs two or three steps of arithmetic. Its answer is written the way GSM8K writes it, with the calculation
of every step in `<<...>>` and the result after `####`:

    Question: Mia buys 4 boxes of pens with 6 pens in each box. She gives 9 pens to Leo. How many pens ...
    Answer: Mia buys 4*6=<<4*6=24>>24 pens.
    Mia has 24-9=<<24-9=15>>15 pens left.
    #### 15

No held-out problem shares its template and its numbers with a training problem, so a model that answers held-out
problems has learned the arithmetic and not the text.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass


NAMES = ("Mia", "Leo", "Emma", "Noah", "Anna", "Ben", "Zoe", "Sam", "Ruth", "Omar", "Ines", "Paul", "Lily", "Hugo")
ITEMS = ("apples", "pens", "books", "cards", "shells", "coins", "stamps", "pears", "eggs", "marbles", "plums")
PLACES = ("garden", "market", "school", "farm", "shop", "library", "park", "kitchen")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MAX_NUMBER = 50  # the largest number in any calculation
MAX_ADDEND = 9  # the largest smaller term of a sum, and the largest number that is taken away

# In a step, `[t=a*b]` is written out as `4*6=<<4*6=24>>24` and `[$t=a*b]` as `4*6=$<<4*6=24>>24`.
_CALCULATION = re.compile(r"\[(\$?)(\w)=(\w+)([-+*/])(\w+)\]")


@dataclass(frozen=True)
class Template:
    """
    One kind of problem.

    Args:
        question (`str`):
            Text with fields for the words (`{name}`, `{friend}`, `{items}`, ...) and the numbers (`{a}`, `{b}`, ...).
        steps (`tuple[str, ...]`):
            The answer, line by line, each with one calculation such as `[t=a*b]`. The last result is the answer.
        numbers (`dict[str, tuple[int, int]]`):
            The smallest and the largest value of each number. Draws with a result that is not a whole number from
            1 to `MAX_NUMBER` are dropped.
    """

    question: str
    steps: tuple[str, ...]
    numbers: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Problem:
    """A question, its answer in GSM8K format, and the key (template and numbers) that keeps the splits apart."""

    question: str
    answer: str
    key: tuple[int, ...]


TEMPLATES: tuple[Template, ...] = (
    Template(
        "{name} buys {a} boxes of {items} with {b} {items} in each box. {name} gives {c} {items} to {friend}. "
        "How many {items} does {name} have left?",
        ("{name} buys [t=a*b] {items}.", "{name} has [r=t-c] {items} left."),
        {"a": (2, 9), "b": (2, 9), "c": (2, 40)},
    ),
    Template(
        "{name} buys {a} {items} for ${b} each at the {place} and gets ${c} off. How much does {name} pay?",
        ("The {items} cost [$t=a*b].", "{name} pays [$r=t-c]."),
        {"a": (2, 9), "b": (2, 9), "c": (2, 12)},
    ),
    Template(
        "{name} has {a} {items} and {friend} has {b} {items}. They share all of them equally among {c} children "
        "in the {place}. How many {items} does each child get?",
        ("Together they have [t=a+b] {items}.", "Each child gets [r=t/c] {items}."),
        {"a": (2, 40), "b": (2, 40), "c": (2, 9)},
    ),
    Template(
        "{name} has {a} {items}. {friend} has {b} more {items} than {name}, and {third} has {c} fewer {items} than "
        "{friend}. How many {items} does {third} have?",
        ("{friend} has [t=a+b] {items}.", "{third} has [r=t-c] {items}."),
        {"a": (2, 60), "b": (2, 30), "c": (2, 30)},
    ),
    Template(
        "{name} earns ${a} an hour at the {place}. {name} works {b} hours on {day} and {c} hours on {day2}. "
        "How much does {name} earn?",
        ("{name} works [t=b+c] hours.", "{name} earns [$r=a*t]."),
        {"a": (2, 9), "b": (2, 8), "c": (2, 8)},
    ),
    Template(
        "{name} reads {a} pages of a book a day for {b} days and another {c} pages on {day}. How many pages does "
        "{name} read altogether?",
        ("{name} reads [t=a*b] pages.", "Altogether it is [r=t+c] pages."),
        {"a": (2, 9), "b": (2, 9), "c": (2, 12)},
    ),
    Template(
        "{name} has {a} {items} and {friend} has half as many. {third} has {b} more {items} than {friend} and gives "
        "{c} of them away. How many {items} does {third} have now?",
        (
            "{friend} has [t=a/2] {items}.",
            "{third} has [u=t+b] {items}.",
            "Now {third} has [r=u-c] {items}.",
        ),
        {"a": (4, 60), "b": (2, 9), "c": (2, 9)},
    ),
    Template(
        "{name} packs {a} bags with {b} {items} each and {friend} packs {c} bags with {d} {items} each. How many "
        "{items} do they pack in total?",
        (
            "{name} packs [t=a*b] {items}.",
            "{friend} packs [u=c*d] {items}.",
            "In total they pack [r=t+u] {items}.",
        ),
        {"a": (2, 9), "b": (2, 9), "c": (2, 9), "d": (2, 9)},
    ),
    Template(
        "{name} has {a} boxes with {b} {items} each. {c} {items} get lost in the {place}. {name} shares the rest "
        "equally among {d} friends. How many {items} does each friend get?",
        ("{name} has [t=a*b] {items}.", "After that [u=t-c] {items} are left.", "Each friend gets [r=u/d] {items}."),
        {"a": (2, 9), "b": (2, 9), "c": (1, 20), "d": (2, 9)},
    ),
    Template(
        "On {day} {name} picks {a} {items} in the morning and {b} {items} in the afternoon. {c} {items} are bad. "
        "The rest is put into bags of {d}. How many bags does {name} fill?",
        ("{name} picks [t=a+b] {items}.", "Of these [u=t-c] {items} are good.", "{name} fills [r=u/d] bags."),
        {"a": (5, 40), "b": (5, 40), "c": (1, 20), "d": (2, 9)},
    ),
    Template(
        "{name} saves ${a} a week for {b} weeks. {friend} gives {name} another ${c}. Then {name} spends ${d} on "
        "{items}. How much money does {name} have now?",
        (
            "{name} saves [$t=a*b].",
            "With the money from {friend} it is [$u=t+c].",
            "Now {name} has [$r=u-d].",
        ),
        {"a": (2, 9), "b": (2, 9), "c": (2, 20), "d": (2, 30)},
    ),
    Template(
        "{name} has {a} {items} and finds {b} more in the {place} on {day}. {friend} has twice as many {items} as "
        "{name} has now. How many {items} does {friend} have?",
        ("{name} has [t=a+b] {items} now.", "{friend} has [r=t*2] {items}."),
        {"a": (2, 30), "b": (2, 30)},
    ),
)


def draw_problem(rng: random.Random) -> Problem:
    """Draw one problem: a template, its words, and numbers whose every intermediate result is a whole number."""
    index = rng.randrange(len(TEMPLATES))
    template = TEMPLATES[index]
    while True:
        values = {key: rng.randint(low, high) for key, (low, high) in template.numbers.items()}
        numbers = tuple(values.values())
        if (calculations := _solve(template, values)) is not None:
            break
    name, friend, third = rng.sample(NAMES, 3)
    day, day2 = rng.sample(DAYS, 2)
    words = {"name": name, "friend": friend, "third": third, "day": day, "day2": day2}
    words |= {"items": rng.choice(ITEMS), "place": rng.choice(PLACES)}
    lines = []
    for step, calculation in zip(template.steps, calculations, strict=True):
        before, after = _CALCULATION.sub("\0", step).split("\0")
        lines.append(before.format(**words) + calculation + after.format(**words))
    answer = "\n".join([*lines, f"#### {values['r']}"])
    return Problem(template.question.format(**words, **values), answer, (index, *numbers))


def _solve(template: Template, values: dict[str, int]) -> list[str] | None:
    """Calculate every step, add the results to `values`, and return the written calculations (`None`: drop it)."""
    written = []
    for step in template.steps:
        match = _CALCULATION.search(step)
        if match is None:
            raise ValueError(f"step {step!r} holds no calculation: write one such as `[t=a*b]`")
        dollar, target, left, operator, right = match.groups()
        x, y = (int(term) if term.isdigit() else values[term] for term in (left, right))
        if operator == "/" and x % y:
            return None
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y if y else 0}[operator]
        if (operator == "+" and min(x, y) > MAX_ADDEND) or (operator == "-" and y > MAX_ADDEND):
            return None
        if not 1 <= result <= MAX_NUMBER:
            return None
        values[target] = result
        written.append(f"{x}{operator}{y}={dollar}<<{x}{operator}{y}={result}>>{result}")
    return written


def make_splits(train: int, validation: int = 0, test: int = 0, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """
    Generate splits of distinct problems; no two splits share a template with the same numbers.

    The test split is drawn first, so that it is the same whatever the sizes of the others.

    Args:
        train (`int`):
            Number of training problems.
        validation (`int`, *optional*, defaults to 0):
            Number of problems for choices that are made by measurement.
        test (`int`, *optional*, defaults to 0):
            Number of held-out problems.
        seed (`int`, *optional*, defaults to 0):
            Seed of the generator.

    Returns:
        `dict[str, list[dict[str, str]]]`: the splits `"train"`, `"validation"` and `"test"`, each a list of
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
