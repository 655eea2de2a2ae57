"""Dual ascent by counting alone: what the logits of each layer's experts have to be shifted by for the load that is wanted.

The load of an expert grows with its shift; how fast depends on the router and the expert, and nobody knows that before having
tried. So each expert has a rate of its own, which grows while its price keeps its sign and shrinks when that turns (as in
Rprop), and each layer ends with the best shifts it has seen. One that is nearly as even as is wanted stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..maths import max_vio, price_of_load


RATE, FASTER, SLOWER = 0.3, 1.4, 0.5
ENOUGH = 1.2  # times the MaxVio that is wanted
WIDEST = 8.0  # farthest that an expert is shifted: a factor of e^8 in its probability


class Ascent:
    """
    The search for the wanted loads, all layers at once.

    Args:
        sizes (`Sequence[int]`): experts of each layer.
        wanted (`Sequence[torch.Tensor]`, *optional*): the loads `(E,)` to come to; even ones unless given.
    """

    def __init__(self, sizes: Sequence[int], wanted: Sequence[Tensor] | None = None) -> None:
        self._wanted = None if wanted is None else [load_E.double().cpu() for load_E in wanted]
        self.best = [torch.zeros(size, dtype=torch.float64) for size in sizes]  # shifts (E,)
        self._spread = [float("inf")] * len(sizes)  # of the prices there
        self._shift = list(self.best)  # asked for last
        self._price = [torch.zeros(size, dtype=torch.float64) for size in sizes]
        self._rate = [torch.full((size,), RATE, dtype=torch.float64) for size in sizes]

    def tell(self, loads: Sequence[Tensor]) -> None:
        """`loads (E,)` are those under the shifts that were asked for last, at first under none."""
        for layer, load_E in enumerate(loads):
            load_E = load_E.double().cpu()
            wanted_E = torch.ones_like(load_E) if self._wanted is None else self._wanted[layer]
            price_E, last_E = price_of_load(load_E, wanted_E), self._price[layer]
            spread = float(price_E.square().mean())
            if spread < self._spread[layer]:
                self.best[layer], self._spread[layer] = self._shift[layer], spread
            self._rate[layer] = self._rate[layer] * torch.where(
                price_E * last_E > 0, FASTER, torch.where(price_E * last_E < 0, SLOWER, 1.0)
            )
            is_enough = float(max_vio(load_E)) <= ENOUGH * float(max_vio(wanted_E))
            self._price[layer] = torch.zeros_like(price_E) if is_enough else price_E

    def ask(self) -> list[Tensor]:
        """The shifts to try next, `(E,)` of each layer."""
        self._shift = [
            (shift_E - rate_E * price_E).clamp(-WIDEST, WIDEST)
            for shift_E, rate_E, price_E in zip(self._shift, self._rate, self._price)
        ]
        return self._shift
