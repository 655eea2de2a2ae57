"""What is counted over the tokens of a step or of an evaluation: one flat fp32 buffer, so that ranks need one all-reduce.

Shapes: E experts, T tokens of a micro-batch, k experts per token, H bins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tokens import Tokens


PAGES, LARGEST = 64, 2**22  # steps whose tallies are cleared together, as far as they have no more numbers than this
ALIGNED = 64  # numbers, of which a page has a multiple: compiled code takes for granted that tensors start at 16 bytes
NEVER = 1e30  # is no sum over the experts of a router


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
        self.shared = 2 * self.total + 3  # numbers in front of the histograms
        self.flat = torch.zeros(self.shared + bins * self.total)

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
        return self.flat[self.shared :].view(self.total, self.bins)

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


class StepTally(Tally):
    """
    The tally of one optimizer step after another, each on a page of its own: so that pages are cleared, and looked through for
    what is not finite, many at a time.
    """

    def __init__(self, sizes: Sequence[int], bins: int = 0) -> None:
        super().__init__(sizes, bins)
        self._numbers = len(self.flat)
        width = -(-self._numbers // ALIGNED) * ALIGNED
        self._pages = torch.zeros(max(1, min(PAGES, LARGEST // width)), width)
        self._page = 0
        self._bad = torch.zeros((), dtype=torch.int64)  # steps on earlier pages that were not finite
        self._bounds, self._weights = torch.zeros(2), torch.zeros(2, self.shared)
        self._weights[1, 2 * self.total + 2] = NEVER  # of `replayed`
        self._open()

    def _open(self) -> None:
        self.flat = self._pages[self._page, : self._numbers]

    def to(self, device: torch.device) -> None:
        self._pages, self._bad = self._pages.to(device), self._bad.to(device)
        self._bounds, self._weights = self._bounds.to(device), self._weights.to(device)
        self._open()

    def bounds(self) -> Tensor:
        """
        What the sum over a router's experts exceeds if this step moves its means, and if it moves its biases, `(2,)`: 0, and more
        than there can be if choices came from outside. Where anything is not finite, 0 times it is NaN, which nothing exceeds.
        """
        # in place, so that autocast leaves it in fp32
        bounds = torch.mv(self._weights, self.flat[: self.shared], out=self._bounds)
        return bounds + 0 * self.margins.sum() if self.bins else bounds

    def turn(self) -> Tensor:
        """Goes on to the next step; returns what was counted in the last, without histograms."""
        done = self.flat[: self.shared]
        if self.bins:
            done = done.clone()  # which lets go of them
        self._page += 1
        if self._page == len(self._pages):
            self._bad += self._not_finite()
            self._pages, self._page = torch.zeros_like(self._pages), 0
        self._open()
        return done

    def _not_finite(self) -> Tensor:
        """How many of the steps on these pages were not finite, `()`."""
        totals = self._pages[: self._page].sum(dim=1)
        return (totals - totals != 0).sum()

    def count_not_finite(self) -> int:
        """How many steps were not finite; reads the device."""
        return int(self._bad + self._not_finite())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "flat"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()  # as a view again, which a pickle would not keep


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
