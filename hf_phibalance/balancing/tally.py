"""What is counted over the tokens of a step or of an evaluation: one flat fp32 buffer, so that ranks need one all-reduce.

Shapes: E experts, T tokens of a micro-batch, k experts per token, H bins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .tokens import Tokens


class Tally:
    """
    Sums over tokens: routing probabilities and top-k assignments of every expert, tokens, what they paid, a histogram per
    expert where one is needed; and the number of forwards that replayed. All is kept in `flat`, of which the properties and
    methods return views.

    Args:
        sizes (`Sequence[int]`): Number of experts of each router.
        bins (`int`, *optional*, defaults to `0`): Bins H of the histogram per expert.
    """

    def __init__(self, sizes: Sequence[int], bins: int = 0) -> None:
        self.bins = bins
        self.total = sum(sizes)
        starts = itertools.accumulate(sizes, initial=0)
        self._spans = [(start, start + size) for start, size in zip(starts, sizes)]
        self.flat = torch.zeros((2 + bins) * self.total + 3)

    @property
    def probs(self) -> Tensor:
        """Routing probabilities, router after router, `(sum of sizes,)`."""
        return self.flat[: self.total]

    @property
    def load(self) -> Tensor:
        """Top-k assignments, router after router, `(sum of sizes,)`."""
        return self.flat[self.total : 2 * self.total]

    def by_statistic(self, statistics: Sequence[str]) -> Tensor:
        """`probs` and `load`, or one of them, as rows, `(S, sum of sizes)`."""
        both = self.flat[: 2 * self.total].view(2, self.total)
        return both if len(statistics) == 2 else both[:1] if statistics[0] == "probs" else both[1:]

    @property
    def tokens(self) -> Tensor:
        """Tokens that counted, `()`."""
        return self.flat[2 * self.total]

    @property
    def paid(self) -> Tensor:
        """Σ_routers Σ_tokens ⟨coef · q, p⟩ of methods that price a step while it runs, `()`."""
        return self.flat[2 * self.total + 1]

    @property
    def replayed(self) -> Tensor:
        """Forwards whose choices came from outside, so that the bias had no part in them, `()`."""
        return self.flat[2 * self.total + 2]

    @property
    def margins(self) -> Tensor:
        """The histograms, router after router, `(sum of sizes, H)`."""
        return self.flat[2 * self.total + 3 :].view(self.total, self.bins)

    def probs_of(self, index: int) -> Tensor:
        """Routing probabilities of router `index`, `(E,)`."""
        start, stop = self._spans[index]
        return self.flat[start:stop]

    def load_of(self, index: int) -> Tensor:
        """Top-k assignments of router `index`, `(E,)`."""
        start, stop = self._spans[index]
        return self.flat[self.total + start : self.total + stop]

    def plain_load_of(self, index: int) -> Tensor:
        """
        What router `index` would have chosen without a selection bias of ours, `(E,)`: only of an evaluation, which has no need of
        probabilities and keeps it in their place.
        """
        return self.probs_of(index)

    def margins_of(self, index: int) -> Tensor:
        """Histograms of router `index`, `(E, H)`."""
        return self.margins[slice(*self._spans[index])]


def count_choice(tally: Tally, index: int, probs: Tensor | None, selected: Tensor, tokens: Tokens) -> None:
    """Adds to router `index` what it chose for `tokens`: `selected (..., k)`, and `probs (T, E)` where they are known."""
    chosen = selected.reshape(-1)
    add_load(tally.load_of(index), chosen, tokens.weights(chosen).to(chosen.device))
    if probs is not None:
        add_probs(tally.probs_of(index), probs, tokens.mask.to(probs.device))


def add_probs(total_E: Tensor, probs: Tensor, mask: Tensor) -> None:
    """`total_E (E,) += Σ_t mask_t p_t`, of `probs (T, E)` and `mask (T,)`."""
    if total_E.dtype == probs.dtype and total_E.device == probs.device:
        total_E.addmv_(probs.t(), mask)  # in place, so that autocast leaves it in fp32
    else:
        total_E.add_((probs * mask.unsqueeze(-1)).sum(dim=0).to(total_E))


def add_load(total_E: Tensor, chosen: Tensor, weight: Tensor) -> None:
    """Adds `weight (T·k,)` to the entries of `total_E (E,)` that `chosen (T·k,)` names."""
    if total_E.device == chosen.device:
        total_E.scatter_add_(0, chosen, weight)
    else:
        load_E = torch.zeros(len(total_E), device=chosen.device).scatter_add_(0, chosen, weight)
        total_E.add_(load_E.to(total_E.device))
