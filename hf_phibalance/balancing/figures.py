"""
The balance of optimizer steps in numbers. They are computed and summed on the device, and read only when they are logged.

| figure | meaning | over several layers |
|---|---|---|
| `max_vio` | load of the busiest expert over the mean load, minus 1 (MaxVio, arXiv 2408.15664); 0 is balance | mean |
| `max_vio_worst_layer` | MaxVio of the least balanced layer | greatest |
| `gini` | Gini coefficient of the loads; 0 is balance | mean |
| `entropy` | entropy of the loads over log E; 1 is balance | mean |
| `dead_experts` | experts with less than 5 % of the mean load | sum |
| `noise_floor` | MaxVio to expect from chance, if all experts were equally likely | mean |
| `tokens` | tokens that were routed | |
| `balance_loss` | Σ over routers of coef · ⟨q, mean p⟩, the term whose gradient is added | sum |
| `price_range` | greatest minus smallest price q in a layer | greatest |
| `bias_range` | greatest minus smallest selection bias in a layer | greatest |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..maths import dead_experts, gini, max_vio, noise_floor, normalised_entropy
from ..routers import RouterSite
from .counts import Counts


COLUMNS = ("max_vio", "gini", "entropy", "dead_experts", "noise_floor", "tokens")


@dataclass
class Figures:
    """
    Sums over optimizer steps. Shapes: L routers, E experts at most.

    Args:
        layers_L6 (`torch.Tensor` of shape `(L, 6)`): `COLUMNS` of each router.
        load_LE (`torch.Tensor` of shape `(L, E)`): top-k selections per expert.
        totals (`torch.Tensor` of shape `(2,)`): tokens, and the mean of the balance loss over them.
        steps (`int`, *optional*, defaults to `1`): number of steps.
    """

    layers_L6: Tensor
    load_LE: Tensor
    totals: Tensor
    steps: int = 1

    @classmethod
    def of(cls, counts: Counts, sites: Sequence[RouterSite]) -> Figures:
        """Computes the figures of `counts`, for all routers with equally many experts at a time."""
        parts, start = [], 0
        for (num_experts, top_k), group in groupby(sites, lambda site: (site.num_experts, site.top_k)):
            stop = start + len(list(group))
            load = counts.load[start:stop, :num_experts]
            tokens = load.sum(-1) / top_k
            floor = noise_floor(num_experts, top_k, tokens.clamp(min=1))
            parts.append(
                torch.stack(
                    [max_vio(load), gini(load), normalised_entropy(load), dead_experts(load), floor, tokens], -1
                )
            )
            start = stop
        balance = counts.balance / counts.tokens.clamp(min=1)
        return cls(torch.cat(parts), counts.load.clone(), torch.stack([counts.tokens, balance]))

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.layers_L6 + other.layers_L6,
            self.load_LE + other.load_LE,
            self.totals + other.totals,
            self.steps + other.steps,
        )

    def means(self, sites: Sequence[RouterSite], per_layer: int = 0) -> dict[str, float]:
        """
        Returns the means over the steps as plain numbers. Reads the device.

        Args:
            sites (`Sequence[RouterSite]`): the routers.
            per_layer (`int`, *optional*, defaults to `0`): at most this many layers, evenly spaced, get a MaxVio of their own.
        """
        rows_L6 = self.layers_L6.cpu() / self.steps
        values: dict[str, float] = {}
        for modality in sorted({site.modality for site in sites}):
            own = [index for index, site in enumerate(sites) if site.modality == modality]
            found = dict(zip(COLUMNS, rows_L6[own].mean(0).tolist()))
            found["dead_experts"] = float(rows_L6[own, 3].sum())
            found["max_vio_worst_layer"] = float(rows_L6[own, 0].max())
            shown = min(per_layer, len(own))
            for index in {round(i * (len(own) - 1) / max(shown - 1, 1)) for i in range(shown)}:
                found[f"max_vio/{sites[own[index]].name}"] = float(rows_L6[own[index], 0])
            prefix = "" if modality == "text" else f"{modality}/"
            values |= {f"{prefix}{name}": value for name, value in found.items()}
        return values | {"tokens": float(self.totals[0]) / self.steps}
