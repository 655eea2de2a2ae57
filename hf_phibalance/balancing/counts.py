"""
Sums over tokens, and the metrics computed from them. Shapes: L routers, E experts at most.

| metric | meaning | over several layers |
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

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..maths import dead_experts, gini, max_vio, noise_floor, normalised_entropy
from ..routers import RouterSite
from .tokens import Tokens


COLUMNS = ("max_vio", "gini", "entropy", "dead_experts", "noise_floor", "tokens")


class Counts:
    """
    Sums over the tokens of a forward, of an optimizer step, or of an evaluation. One flat fp32 buffer holds them all, so that one
    all-reduce suffices. `shape` is (L, E); a router with fewer experts leaves the rest at 0. `extra` is the number of further
    columns per expert, for methods and evaluations.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, extra: int = 0) -> None:
        number = shape[0] * shape[1]
        sizes = [2 * number, 4 * shape[0], 5, extra * number]
        with torch.inference_mode(False):  # an evaluation may begin inside inference mode and end outside
            self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        sums, confidence, totals, extras = self.flat.split(sizes)
        self.sums, self.extra = sums.view(2, *shape), extras.view(*shape, extra)
        self.probs, self.load = self.sums  # (L, E) routing probabilities, and top-k selections per expert
        # (L, 4) greatest probability, that of the chosen experts, entropy in bits; and tokens. 0 unless they are measured
        self.confidence = confidence.view(shape[0], 4)
        self.tokens = totals[0]  # () tokens that count
        self.replayed = totals[1]  # () forwards whose selection came from outside
        self.balance = totals[2]  # () Σ_routers Σ_tokens ⟨coef · q, p⟩
        self.skipped = totals[3]  # () ranks whose optimizer has skipped the step
        self.padding = totals[4]  # () pad tokens at the ends of rows among `tokens`, if no attention mask was given

    def like(self) -> Counts:
        """Returns empty counts of the same shape."""
        layers, experts, extra = self.extra.shape
        return Counts((layers, experts), self.flat.device, extra)

    def add(self, index: int, site: RouterSite, probs: Tensor, selected: Tensor, tokens: Tokens) -> None:
        """Adds the probabilities `(T, E)` and selected experts `(..., k)` of one call of a router."""
        device, mask = self.flat.device, tokens.mask_at(site, len(probs))
        chosen = selected.reshape(-1).to(device)  # layers of one model may be on several devices
        own = self.probs[index, : site.num_experts]
        own.addmv_(probs.to(device=device, dtype=torch.float32).t(), mask)  # in place: autocast leaves it in fp32
        self.load[index].scatter_add_(0, chosen, tokens.repeated(mask, len(chosen) // len(mask)))

    def add_confidence(self, index: int, site: RouterSite, probs: Tensor, selected: Tensor, tokens: Tokens) -> None:
        """Adds how sure a router is, from the arguments of [`~Counts.add`]."""
        device = self.flat.device
        probs, chosen = probs.to(device=device, dtype=torch.float32), selected.reshape(len(probs), -1).to(device)
        bits_T = torch.special.entr(probs).sum(-1) / math.log(2)
        columns = [probs.amax(-1), probs.gather(-1, chosen).sum(-1), bits_T, torch.ones_like(bits_T)]
        self.confidence[index].addmv_(torch.stack(columns), tokens.mask_at(site, len(probs)))


@dataclass
class Figures:
    """Metrics summed over optimizer steps. They stay on the device until they are logged."""

    layers_L6: Tensor  # (L, 6) `COLUMNS` of each router
    load_LE: Tensor  # (L, E) top-k selections per expert
    totals: Tensor  # (2,) tokens, and the mean of the balance loss over them
    called_L: Tensor  # (L,) steps in which tokens reached the router; without images none reach some
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
            columns = [max_vio(load), gini(load), normalised_entropy(load), dead_experts(load), floor, tokens]
            parts.append(torch.stack(columns, -1))
            start = stop
        balance = counts.balance / counts.tokens.clamp(min=1)
        totals, called_L = torch.stack([counts.tokens, balance]), counts.load.any(-1).float()
        return cls(torch.cat(parts), counts.load.clone(), totals, called_L)

    def __add__(self, other: Figures) -> Figures:
        layers_L6, load_LE = self.layers_L6 + other.layers_L6, self.load_LE + other.load_LE
        totals, called_L = self.totals + other.totals, self.called_L + other.called_L
        return Figures(layers_L6, load_LE, totals, called_L, self.steps + other.steps)

    def means(self, sites: Sequence[RouterSite], per_layer: int = 0) -> dict[str, float]:
        """
        Returns the means over the steps as plain numbers; at most `per_layer` layers get their own. Those of a router are over the
        steps in which tokens reached it, and routers for images that had none are left out. Reads the device.
        """
        called_L = self.called_L.cpu()
        rows_L6 = self.layers_L6.cpu() / called_L.clamp(min=1)[:, None]
        values: dict[str, float] = {}
        for modality in sorted({site.modality for site, n in zip(sites, called_L) if n or site.modality == "text"}):
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
