"""
Streams of batches: how many rows of which domain each optimizer step gets, and in which order their windows come.

A stream depends on the seed and on nothing that a balancing method does, so that all methods see the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch import Tensor

from .corpus import Corpus
from .documents import DOMAINS


STREAMS = ("mixed", "blocked", "shift")
# Shares of the domains in a step: equal, and for the shifted stream before and after half of the steps.
EQUAL = (1 / 3, 1 / 3, 1 / 3)
BEFORE, AFTER = (4 / 9, 4 / 9, 1 / 9), (1 / 9, 1 / 9, 7 / 9)


def schedule(stream: str, steps: int, rows: int) -> list[tuple[int, ...]]:
    """
    Rows of each domain in every optimizer step, in the order of `DOMAINS`; each step's add up to `rows`.

    - `"mixed"`: every step holds all domains, as equally as whole rows allow.
    - `"blocked"`: every step holds one domain; the domains take turns.
    - `"shift"`: shares of 4/9, 4/9, 1/9 in the first half of the steps and of 1/9, 1/9, 7/9 in the second.

    Raises:
        ValueError: for another stream, or if a step cannot hold all domains.
    """
    if stream not in STREAMS:
        raise ValueError(f"`stream` must be one of {', '.join(map(repr, STREAMS))}, got {stream!r}.")
    if stream == "blocked":
        return [
            tuple(rows * (domain == step % len(DOMAINS)) for domain in range(len(DOMAINS))) for step in range(steps)
        ]
    if rows < len(DOMAINS):
        raise ValueError(f"`rows` is {rows}, but a step of stream {stream!r} holds all {len(DOMAINS)} domains.")
    plan, owed = [], [0.0] * len(DOMAINS)
    for step in range(steps):
        shares = EQUAL if stream == "mixed" else BEFORE if step < switch_step(steps) else AFTER
        owed = [have + rows * share for have, share in zip(owed, shares)]
        counts = [max(1, int(have + 1e-9)) for have in owed]
        while sum(counts) != rows:  # whole rows: the domain that is owed most (or least) gives way
            sign = 1 if sum(counts) < rows else -1
            open_to = [d for d in range(len(DOMAINS)) if counts[d] + sign >= 1]
            domain = max(open_to, key=lambda d: sign * (owed[d] - counts[d]))
            counts[domain] += sign
        owed = [have - count for have, count in zip(owed, counts)]
        plan.append(tuple(counts))
    return plan


def switch_step(steps: int) -> int:
    """The first step of the second mixture."""
    return steps // 2


def batches(corpus: Corpus, stream: str, steps: int, rows: int, seed: int) -> Iterator[Tensor]:
    """
    The token ids `(rows, window)` of every optimizer step. Each domain is gone through in an order that depends on the
    seed, every window once before any comes again.
    """
    sources = [_endless(corpus.train[domain], f"{seed} {domain}") for domain in DOMAINS]
    for counts in schedule(stream, steps, rows):
        yield torch.stack([next(source) for source, count in zip(sources, counts) for _ in range(count)])


def _endless(windows: Tensor, seed: str) -> Iterator[Tensor]:
    rng = random.Random(seed)
    while True:
        for index in rng.sample(range(len(windows)), len(windows)):
            yield windows[index]
