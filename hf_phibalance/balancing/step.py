"""An optimizer step: opened with the tokens it will have, closed by moving the duals, or given up.

begin -> forwards (see `meter`) -> backward -> optimizer -> close. In between, the prices are fixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import PhiBalanceConfig
from ..maths import BINS
from ..routers import RouterSite, find_copies
from .duals import Duals
from .ranks import Ranks
from .refusals import check_first_step, check_ranks
from .tally import StepTally, Tally
from .tokens import Announced, Counted, Tokens, count_mask


logger = logging.get_logger(__name__)


@dataclass
class OptimizerStep:
    """What is known of the optimizer step under way."""

    announced: bool = False  # by `Steps.begin`
    micro_batches: int = 1  # forwards that share its coefficient, if the tokens are unknown
    tokens: Tensor | None = None  # () number of tokens that count, over all micro-batches and ranks
    batches: Announced = field(default_factory=Announced)  # that they are in
    loss_scale: float | Tensor = 1.0  # what gradients are divided by before the optimizer sees them
    trained: bool = False  # whether a training forward has run
    deferred: list[Tokens] = field(default_factory=list)  # forwards under reentrant checkpointing
    weights_version: int = -1  # of a trainable parameter, at the latest forward


class Steps:
    """
    The optimizer steps of a patched model, one after another.

    Args:
        root (`torch.nn.Module`): the model.
        config (`PhiBalanceConfig`): its configuration.
        sites (`Sequence[RouterSite]`): its routers.
        duals (`Duals`): what a step moves.
        ranks (`Ranks`): who shares a step.
    """

    def __init__(
        self, root: nn.Module, config: PhiBalanceConfig, sites: Sequence[RouterSite], duals: Duals, ranks: Ranks
    ) -> None:
        self.root, self.config, self.sites, self.duals, self.ranks = root, config, sites, duals, ranks
        sizes = duals.layout.sizes
        self.now = OptimizerStep()
        self.tally = StepTally(sizes, BINS if config.rules.bias_rule == "quantile" else 0)  # of the step under way
        self.last = Tally(sizes)  # of the last step, over all ranks
        self.last_price = torch.zeros(duals.layout.total)  # that was charged in it
        self._checked = False
        self._top_k = max(site.top_k for site in sites)

    def begin(self, micro_batches: Sequence[Mapping[str, Any]] | int, loss_scale: float | Tensor) -> None:
        """See [`PhiBalancer.begin_step`]."""
        if self.now.announced and self.now.trained:
            raise RuntimeError(
                "begin_step() was called twice without step() in between, so the prices would never move. Call "
                "balancer.step() after optimizer.step(), or let phb.attach(trainer) do both. After a step that was "
                "given up (an error, a skipped batch), call balancer.discard_step()."
            )
        count = micro_batches if isinstance(micro_batches, int) else len(micro_batches)
        if count < 1:
            raise ValueError(f"`micro_batches` must hold at least one micro-batch, got {micro_batches!r}.")
        self.discard()
        self.now = OptimizerStep(announced=True, micro_batches=count, loss_scale=loss_scale)
        if isinstance(micro_batches, int):
            return
        device = self.move_to_model()
        numbers = [number for batch in micro_batches if (number := self._announce(batch, device)) is not None]
        if len(numbers) < count:
            logger.warning_once(
                f"The micro-batches do not hold what token_mask={self.config.token_mask!r} needs; each will be "
                "charged its own mean instead of its exact share of the step's tokens."
            )
            return
        self.now.tokens = self.ranks.sum(numbers[0] if count == 1 else torch.stack(numbers).sum())

    def _announce(self, batch: Mapping[str, Any], device: torch.device) -> Tensor | None:
        """How many tokens of `batch` count, `()`; its forward need not count them again."""
        mask_BS = count_mask(batch, self.config.token_mask)
        if mask_BS is None:
            return None
        if mask_BS.device != device:  # its forward will get a copy
            return mask_BS.sum(dtype=torch.float32).to(device)
        counted = Counted.of(mask_BS, self._top_k)
        self.now.batches.keep(batch, self.config.token_mask, counted)
        return counted.number

    def count(self, inputs: Mapping[str, Any]) -> Counted | None:
        """Which tokens of a forward with these `inputs` count, `None` if nothing tells."""
        counted = self.now.batches.find(inputs, self.config.token_mask)
        if counted is not None:
            return counted
        mask_BS = count_mask(inputs, self.config.token_mask)
        return None if mask_BS is None else Counted.of(mask_BS.to(self.move_to_model()), self._top_k)

    def begin_implicitly(self) -> None:
        """A training forward without `begin`: fine for a step of one micro-batch in one process."""
        probe = next((p for p in self.root.parameters() if p.requires_grad), None)
        if self.now.trained and self.config.is_on and probe is not None:
            remedy = "phb.attach(trainer) or PhiBalanceCallback does that inside a Trainer."
            if probe._version != self.now.weights_version:
                raise RuntimeError(
                    "The optimizer has stepped without balancer.step() after it, so the prices would never move. Call "
                    f"phb.get_balancer(model).step() after optimizer.step(); {remedy}"
                )
            if probe.grad is not None:
                raise RuntimeError(
                    "A second training forward on top of unused gradients, without balancer.begin_step(micro_batches): "
                    "each token's share of the optimizer step is unknown. Call begin_step with all micro-batches of "
                    f"the step before the first one; {remedy}"
                )
        if self.now.trained:
            self.discard()  # nothing came of the earlier forward
        if self.ranks.count > 1 and self.config.charges:
            raise RuntimeError(
                f"{self.ranks.count} data-parallel ranks need balancer.begin_step(micro_batches) on every rank before "
                "the first forward of an optimizer step; phb.attach(trainer) does that inside a Trainer."
            )
        self.now.weights_version = -1 if probe is None else probe._version

    def divisor(self, counted: Counted) -> Tensor:
        """What a token's gradient is divided by, `()`, so that the optimizer gets 1/N of it whatever happens in between."""
        tokens, share = self.now.tokens, float(self.ranks.count)  # over which gradients are averaged afterwards
        if tokens is None:
            tokens, share = counted.number, 1 / self.now.micro_batches
        tokens, scale = tokens.clamp(min=1), share * self.now.loss_scale
        return tokens if isinstance(scale, float) and scale == 1 else tokens / scale

    def close(self, skipped: bool | None = None) -> None:
        """See [`PhiBalancer.step`]."""
        if not self.now.trained:
            raise RuntimeError(
                "step() was called before any training forward of the patched model. Layers that run without the forward "
                f"of {type(self.root).__name__} around them, as in a stage of torch.distributed.pipelining, are neither "
                "counted nor charged: φ-balancing does not support pipelines."
            )
        if skipped is not None and self._any_rank(skipped):
            self.discard()
            return
        tally = self.tally
        if not self._checked:
            check_ranks(self.config, self.duals.layout, self.ranks, tally)
        self.ranks.sum_(tally.flat)
        if not self._checked:
            find_copies(self.root, self.sites)
            self._checked = check_first_step(self.config, self.sites, self.duals.layout, tally, self.now.tokens)
        if self.config.coef > 0:
            self.last_price = self.duals.price  # which is not written to again
        self.duals.update(tally)
        self.last.flat = tally.turn()
        self.now = OptimizerStep()

    def _any_rank(self, skipped: bool) -> bool:
        """Whether any rank has skipped its optimizer step; reads the device, as the gradient scaler has just done."""
        flag = self.tally.flat.new_tensor(float(skipped))
        self.ranks.sum_(flag)
        return bool(flag)

    def discard(self) -> None:
        """Forgets what has been counted since the last step."""
        if self.now.trained:
            self.tally.flat.zero_()
        self.now = OptimizerStep()

    def check_finite(self) -> None:
        """See [`PhiBalancer.check_finite`]."""
        bad = self.tally.count_not_finite()
        if bad:
            logger.warning_once(
                f"The routing statistics of {bad} step(s) were not finite (the loss or the router logits diverged); "
                "they were left out of the means and prices. Lower the learning rate or check the data."
            )

    def move_to_model(self) -> torch.device:
        """Moves the state to the device of the model, if that has changed."""
        present = self.tally.flat.device
        device = next((p.device for p in self.root.parameters() if p.device.type != "meta"), present)
        if device != present:
            self.duals.to(device)
            self.tally.to(device)
            self.last.flat, self.last_price = self.last.flat.to(device), self.last_price.to(device)
        return device

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the step under way."""
        return {**vars(self), "now": OptimizerStep()}
