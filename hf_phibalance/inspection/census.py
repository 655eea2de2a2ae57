"""Counting what routers choose, by hooks that only look.

Forward hooks count, on the device and for one batch at a time, which experts each router chose and how sure it was.
What is kept is two counts per layer, domain and expert, however much is read: those of every other sequence, and those
of the rest, so that the noise of the text itself can be told. Shapes: D domains, E experts, T tokens, k experts per
token; B sequences of a batch, S long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from ..balancing import find_balancer
from ..maths import routing_probs
from ..routers import RouterSite, find_backbone, find_routers, reading, unwrap
from .findings import CONFIDENCE, Layer


class RouterCensus:
    """
    A [`RouterReader`] that counts what the routers of a model choose, by hooks that only look. They are the hooks of
    balancing, so that what is read is what balancing would read, in every family.

    Args:
        model (`torch.nn.Module`): A MoE model of transformers, possibly wrapped or patched.
        domains (`int`): Number of domains.

    Raises:
        ValueError: if the model has no router that can be read.
    """

    def __init__(self, model: nn.Module, domains: int) -> None:
        self.root = unwrap(model)[-1]
        try:
            self.sites: list[RouterSite] = find_routers(self.root)
        except ValueError as error:
            raise ValueError(f"There is nothing to inspect: {error}") from error
        self.domains = domains
        self.backbone = find_backbone(self.root, self.sites)
        self.balancer = find_balancer(model)  # its selection bias is in force
        self._counts: list[Tensor | None] = [None] * len(self.sites)
        self._confidence: list[Tensor | None] = [None] * len(self.sites)
        self._top_k = [site.top_k for site in self.sites]
        self._mask: Tensor | None = None  # (T,) of the forward under way
        self._half = torch.zeros(0)  # (T,)
        self._domain = 0

    @contextmanager
    def attached(self) -> Iterator[RouterCensus]:
        """While open, the hooks are in the model."""
        with reading(self):
            yield self

    @contextmanager
    def counting(self, domain: int, mask_BS: Tensor, half_B: Tensor) -> Iterator[None]:
        """
        While open, a forward of tokens of which `mask_BS (B, S)` count belongs to domain number `domain`; `half_B (B,)`
        says by 0 or 1 to which half each sequence belongs.
        """
        self._domain, self._mask = domain, mask_BS.reshape(-1)
        self._half = half_B.unsqueeze(-1).expand_as(mask_BS).reshape(-1)
        try:
            yield
        finally:
            self._mask = None

    @property
    def is_idle(self) -> bool:
        return self._mask is None

    @property
    def owner(self) -> nn.Module:
        return self.root

    def choice_bias(self, index: int) -> Tensor | None:
        """Bias that is in force in the selection of router `index`, for those that do not return their choice."""
        if self.balancer is not None:
            return self.balancer.forwards.choice_bias(index)
        bias = self.sites[index].read_native_bias()
        if bias is None and self.sites[index].native_bias:
            raise ValueError(
                f"the choice of router {self.sites[index].name!r} cannot be told while its selection bias is offloaded: "
                "load the model without offloading to CPU or disk."
            )
        return bias

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """Counts one call of router `index`: `logits (T, E)`, `selected (..., k)`; returns `carrier` as it is."""
        site, mask_T = self.sites[index], cast(Tensor, self._mask).to(logits.device)
        if logits.shape != (mask_T.numel(), site.num_experts):
            raise ValueError(
                f"router {site.name!r} returned logits of shape {tuple(logits.shape)} where {mask_T.numel()} tokens and "
                f"{site.num_experts} experts were expected: this model routes something else than its tokens."
            )
        chosen_Tk = selected.reshape(mask_T.numel(), -1)
        if self._counts[index] is None:
            exact = torch.float32 if logits.device.type == "mps" else torch.float64
            self._counts[index] = logits.new_zeros(2, self.domains, site.num_experts, dtype=torch.int64)
            self._confidence[index] = logits.new_zeros(self.domains, len(CONFIDENCE), dtype=exact)
            self._top_k[index] = chosen_Tk.shape[-1]
        counts, confidence = cast(Tensor, self._counts[index]), cast(Tensor, self._confidence[index])
        cell_Tk = chosen_Tk + (site.num_experts * self._half.to(logits.device)).unsqueeze(-1)
        added = torch.zeros(2 * site.num_experts, dtype=torch.int64, device=logits.device)
        added.scatter_add_(0, cell_Tk.reshape(-1), mask_T.long().unsqueeze(-1).expand_as(cell_Tk).reshape(-1))
        counts[:, self._domain] += added.view(2, -1)
        probs_TE = routing_probs(logits, site.scoring)
        figures_3T = torch.stack(
            [
                probs_TE.amax(-1),
                probs_TE.gather(-1, chosen_Tk).sum(-1),
                torch.special.entr(probs_TE).sum(-1) / math.log(2),
            ]
        )
        confidence[self._domain] += torch.where(mask_T, figures_3T, 0.0).to(confidence.dtype).sum(-1)
        return carrier

    def layers(self) -> list[Layer]:
        """What has been counted, of the routers that were called."""
        return [
            Layer(site.name, top_k, site.scoring, counts.cpu(), cast(Tensor, sums).double().cpu())
            for site, top_k, counts, sums in zip(self.sites, self._top_k, self._counts, self._confidence)
            if counts is not None
        ]

    def uncalled(self) -> list[str]:
        """Names of routers that were never called."""
        return [site.name for site, counts in zip(self.sites, self._counts) if counts is None]
