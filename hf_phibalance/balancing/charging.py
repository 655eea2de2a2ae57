"""What a router charges its tokens, and how the charge gets into its gradient.

Shapes: E experts, T tokens of a micro-batch, k experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import PhiBalanceConfig
from ..maths import ChargePrices, ChargeProbs, routing_probs, sequence_price
from ..routers import RouterSite, Softmax
from .duals import Duals
from .ranks import Ranks
from .tally import Tally, count_choice
from .tokens import Tokens


class Charging:
    """
    Charges the routers of a model.

    Args:
        config (`PhiBalanceConfig`): strengths, and when the price is taken.
        sites (`Sequence[RouterSite]`): the routers.
        duals (`Duals`): prices and tolls in force.
        tally (`Tally`): sums of the step under way, for prices that depend on it.
        ranks (`Ranks`): who shares the step.
    """

    def __init__(
        self, config: PhiBalanceConfig, sites: Sequence[RouterSite], duals: Duals, tally: Tally, ranks: Ranks
    ) -> None:
        self.config, self.sites, self.duals, self.tally, self.ranks = config, sites, duals, tally, ranks
        self._spans = duals.layout.spans
        self.rehearsed: Tensor | None = None  # coef · q of all routers, flat, in place of what the batch at hand gives

    def charge(
        self,
        index: int,
        logits: Tensor,
        probs: Tensor | None,
        selected: Tensor,
        softmax: Softmax | None,
        carrier: Tensor,
        tokens: Tokens,
    ) -> Tensor:
        """
        Charges router `index` for `tokens`; returns `carrier`, through which the charge will be paid.

        Args:
            logits (`torch.Tensor` of shape `(T, E)`), probs (`torch.Tensor` of shape `(T, E)`, *optional*),
            selected (`torch.Tensor` of shape `(..., k)`): what the router did.
            softmax (`Softmax`, *optional*): its own softmax, where it took one.
            carrier (`torch.Tensor`): any differentiable output of the router.
            tokens (`Tokens`): who pays, and with what weight.
        """
        site = self.sites[index]
        site.charged = True
        price = self._toll(index, probs, selected, tokens).to(logits.device)
        rate = tokens.rate.to(logits.device)
        if softmax is not None and self._carries(site, softmax, carrier):
            softmax.probs.register_hook(ChargeProbs(price, rate))
            return carrier
        return self._inject(site, carrier, logits, probs, price, rate, tokens)

    def repeat(self, index: int, logits: Tensor, softmax: Softmax | None, carrier: Tensor) -> Tensor:
        """
        A router runs again under non-reentrant checkpointing, which wants the same tensors saved and nothing else: its
        first run pays. Other forwards may have come in between, so the tokens at hand need not be this router's.
        """
        if not self.config.charges or not torch.is_grad_enabled() or not logits.requires_grad:
            return carrier
        site = self.sites[index]
        if softmax is not None and self._carries(site, softmax, carrier):
            return carrier
        price = self.duals.toll[self._spans[index]].to(logits.device)
        with torch.no_grad():
            probs = routing_probs(logits, site.scoring) if softmax is None else softmax.probs
        return self._inject(site, carrier, logits, probs, price, logits.new_zeros(len(logits)))

    @torch.no_grad()
    def fill_pooled(self, toll: Tensor, before: Tensor) -> None:
        """Fills in what the forward that has just ended charges, before its backward; `before` it was this tally."""
        now = copy.copy(self.tally)
        now.flat = now.flat - before
        toll.copy_(self.duals.pooled_toll(now.load))
        self.tally.paid.add_((now.probs * toll).sum())

    def _carries(self, site: RouterSite, softmax: Softmax, carrier: Tensor) -> bool:
        """Whether the softmax of `site` can be charged itself: the task gradient comes by, and only prices are due."""
        if self.config.z_loss_coef > 0 or self.config.sequence_coef > 0:
            return False
        if site.softmax_carries is None:
            site.softmax_carries = softmax.leads_to(carrier)
        return site.softmax_carries

    def _inject(
        self,
        site: RouterSite,
        carrier: Tensor,
        logits: Tensor,
        probs: Tensor | None,
        price: Tensor,
        rate: Tensor,
        tokens: Tokens | None = None,
    ) -> Tensor:
        sequence = None
        if tokens is not None and self.config.sequence_coef > 0:
            mask_BS = tokens.mask.to(logits.device).view(tokens.batch_size, -1)
            with torch.no_grad():
                sequence = sequence_price(logits, site.scoring, site.top_k, mask_BS) * self.config.sequence_coef
        return ChargePrices.apply(carrier, logits, probs, price, sequence, rate, site.scoring, self.config.z_loss_coef)

    def _toll(self, index: int, probs: Tensor | None, selected: Tensor, tokens: Tokens) -> Tensor:
        """coef · q, `(E,)`, that router `index` charges the tokens at hand."""
        if self.rehearsed is not None:
            return self.rehearsed[self._spans[index]]
        if tokens.toll is not None:
            return tokens.toll[self._spans[index]]
        if self.config.price_from == "previous" or self.config.coef == 0:
            return self.duals.toll[self._spans[index]]
        with torch.no_grad():
            return self._toll_now(index, probs, selected, tokens)

    def _toll_now(self, index: int, probs: Tensor | None, selected: Tensor, tokens: Tokens) -> Tensor:
        """The same where the price is not that of the previous step; notes what is paid."""
        now = Tally([self.sites[index].num_experts])
        now.flat = now.flat.to(selected.device)
        count_choice(now, 0, probs, selected, tokens)
        tracked_E = getattr(now, self.config.track)
        if self.config.price_from == "global":
            own = self.tally.probs_of if self.config.track == "probs" else self.tally.load_of
            tracked_E = own(index).to(tracked_E.device, copy=True)
            self.ranks.sum_(tracked_E)
        toll = self.duals.current_toll(index, tracked_E)
        self.tally.paid.add_((now.probs * toll).sum().to(self.tally.flat.device))
        return toll
