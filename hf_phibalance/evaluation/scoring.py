"""
The rules by which GSM8K answers and HumanEval samples are scored, as pure functions without dependencies.

They are those of lm-evaluation-harness (task `gsm8k`, version 3.0, and task `humaneval`) and of openai/human-eval, so
that scores can be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod


GSM8K_STOPS: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
"""A GSM8K answer ends at the first of these (or at the end-of-sequence token, or after 256 tokens)."""

INVALID = "[invalid]"
"""What an answer without a number is read as."""

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_REMOVED = tuple(re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"))


def truncate(text: str, stops: Iterable[str]) -> str:
    """
    The part of `text` before the first stop string.

    Args:
        text (`str`): A generated continuation.
        stops (`Iterable[str]`): For instance `GSM8K_STOPS`.

    Returns:
        `str`: `text` without the earliest of the stop strings and all that follows it.
    """
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def extract_strict(text: str) -> str:
    """The number after the first `#### ` of `text`, not yet normalised, or `INVALID`."""
    match = _STRICT.search(text)
    return match[1].strip() if match else INVALID


def extract_flexible(text: str) -> str:
    """The last number of `text`, wherever it stands, not yet normalised, or `INVALID`."""
    matches = _FLEXIBLE.findall(text)
    return (matches[-1][0] or matches[-1][1]).strip() if matches else INVALID


def normalise_answer(text: str) -> str:
    """
    What is compared of an extracted number or of a gold answer.

    Args:
        text (`str`): The number, or a whole gold answer that ends in `#### <number>`.

    Returns:
        `str`: `text` without `,`, without `$`, without everything up to the last `#### `, without a final `.`, and
        in lower case.
    """
    for pattern in _REMOVED:
        text = pattern.sub("", text)
    return text.lower()


def gold_answer(reference: object) -> str:
    """
    A gold answer as text: the `answer` field of GSM8K as it is, or a bare number.

    Args:
        reference (`str`, `int` or `float`): The answer field, or the number; `18.0` is the same as `18`.

    Returns:
        `str`: Text for `normalise_answer`.

    Raises:
        `TypeError`: If it is neither text nor a number.
    """
    if isinstance(reference, str):
        return reference
    if isinstance(reference, bool) or not isinstance(reference, (int, float)):
        raise TypeError(
            f"references: {reference!r} is a {type(reference).__name__}. Give the answer field of GSM8K as text, or "
            "its final number."
        )
    return str(int(reference)) if isinstance(reference, float) and reference.is_integer() else str(reference)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """
    Probability that at least one of `k` samples is right, estimated without bias from more samples.

    Args:
        samples (`int`): Number of samples n drawn for the problem, at least `k`.
        correct (`int`): How many of them are right, c.
        k (`int`): Number of attempts.

    Returns:
        `float`: `1` if `n - c < k`, else `1 - prod_{i=n-c+1..n} (1 - k / i)`.

    Raises:
        `ValueError`: If the numbers do not fit together.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"samples={samples}, correct={correct}, k={k}: needs 1 <= k <= samples and 0 <= correct <= samples."
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))
