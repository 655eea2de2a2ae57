"""
Scores GSM8K answers and HumanEval samples. Pure functions without dependencies.

The rules are those of lm-evaluation-harness (task `gsm8k`, version 3.0, and task `humaneval`) and of
openai/human-eval, so that scores can be compared with published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import comb
from typing import Any


GSM8K_STOPS: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
"""A GSM8K answer ends at the first of these (or at the end-of-sequence token, or after 256 tokens)."""

INVALID = "[invalid]"
"""Result for an answer without a number."""

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def truncate(text: str, stops: Iterable[str]) -> str:
    """Returns the part of `text` before the first of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def extract_strict(text: str) -> str:
    """Returns the number after the first `#### ` of `text`, not yet normalised, or `INVALID`."""
    match = _STRICT.search(text)
    return match[1].strip() if match else INVALID


def extract_flexible(text: str) -> str:
    """Returns the last number of `text`, not yet normalised, or `INVALID`."""
    matches = _FLEXIBLE.findall(text)
    return (matches[-1][0] or matches[-1][1]).strip() if matches else INVALID


def normalise_answer(text: str) -> str:
    """
    Normalises a number for comparison: lower case, without `,`, `$`, everything up to the last `#### `, and a final
    `.`. `text` may be a whole gold answer that ends in `#### <number>`.
    """
    for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


def gold_answer(reference: object) -> str:
    """
    Returns a gold answer as text for `normalise_answer`. The number `18.0` is the same as `18`.

    Args:
        reference (`str`, `int` or `float`): The `answer` field of GSM8K, or its final number.

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


def score_gsm8k(prediction: str, reference: str) -> dict[str, Any]:
    """Returns the numbers found in an answer, and whether each is right."""
    gold = normalise_answer(reference)
    strict, flexible = normalise_answer(extract_strict(prediction)), normalise_answer(extract_flexible(prediction))
    read = {"strict": strict, "flexible": flexible, "gold": gold}
    return {**read, "strict_match": strict == gold, "flexible_extract": flexible == gold}


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """
    Returns the unbiased estimate of the probability that at least one of `k` samples is right.

    Args:
        samples (`int`): Number n of samples of the problem, at least `k`.
        correct (`int`): Number c of right samples.
        k (`int`): Number of attempts.

    Returns:
        `float`: `1 - comb(n - c, k) / comb(n, k)`.

    Raises:
        `ValueError`: If not `1 <= k <= samples` and `0 <= correct <= samples`.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"samples={samples}, correct={correct}, k={k}: needs 1 <= k <= samples and 0 <= correct <= samples."
        )
    return 1.0 - comb(samples - correct, k) / comb(samples, k)
