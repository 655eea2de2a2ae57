"""Sums over tokens, in one flat fp32 buffer, so that one all-reduce suffices. Shapes: L routers, E experts at most."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routers import RouterSite
from .tokens import Tokens


class Counts:
    """
    Sums over the tokens of a forward, of an optimizer step, or of an evaluation.

    Args:
        shape (`tuple[int, int]`): (L, E). A router with fewer experts leaves the rest at 0.
        device (`torch.device`): of the buffer.
        extra (`int`, *optional*, defaults to `0`): number of further columns per expert, for methods and evaluations.

    Attributes:
        probs (`torch.Tensor` of shape `(L, E)`): routing probabilities.
        load (`torch.Tensor` of shape `(L, E)`): top-k selections per expert.
        tokens (`torch.Tensor` of shape `()`): tokens that count.
        replayed (`torch.Tensor` of shape `()`): forwards whose selection came from outside.
        balance (`torch.Tensor` of shape `()`): Σ_routers Σ_tokens ⟨coef · q, p⟩.
        skipped (`torch.Tensor` of shape `()`): ranks whose optimizer has skipped the step.
        padding (`torch.Tensor` of shape `()`): pad tokens at the ends of rows among `tokens`, if no attention mask was given.
        extra (`torch.Tensor` of shape `(L, E, extra)`): the further columns.
    """

    def __init__(self, shape: tuple[int, int], device: torch.device, extra: int = 0) -> None:
        self.shape, self._extra = shape, extra
        number = shape[0] * shape[1]
        with torch.inference_mode(False):  # an evaluation may begin inside inference mode and end outside
            self.flat = torch.zeros((2 + extra) * number + 5, dtype=torch.float32, device=device)
        sums, extras, self.totals = self.flat.split([2 * number, extra * number, 5])
        self.sums = sums.view(2, *shape)
        self.probs, self.load = self.sums
        self.extra = extras.view(*shape, extra)
        self.tokens, self.replayed, self.balance, self.skipped, self.padding = self.totals

    def like(self) -> Counts:
        """Empty counts of the same shape."""
        return Counts(self.shape, self.flat.device, self._extra)

    def add(self, index: int, site: RouterSite, probs: Tensor, selected: Tensor, tokens: Tokens) -> None:
        """Adds the probabilities `(T, E)` and selected experts `(..., k)` of one call of a router."""
        device, mask = self.flat.device, tokens.mask_at(site, len(probs))
        chosen = selected.reshape(-1).to(device)  # layers of one model may be on several devices
        own = self.probs[index, : site.num_experts]
        own.addmv_(probs.to(device=device, dtype=torch.float32).t(), mask)  # in place: autocast leaves it in fp32
        self.load[index].scatter_add_(0, chosen, tokens.entries_of(mask, len(chosen) // len(mask)))
