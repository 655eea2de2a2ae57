"""
The training loop around a patched model: announces, ends and gives up optimizer steps.

Torch's optimizers and scalers report by themselves ([`process`]), so errors could stay silent. Warns if no gradient comes back,
if the optimizer is not torch's, if tokens were announced wrongly, or if statistics are not finite.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import logging

from ..maths import BINS
from . import process
from .checks import check_first_step, warn_of_rounded_routers
from .counts import Counts
from .step import OptimizerStep
from .tokens import announced_masks


if TYPE_CHECKING:
    from .balancer import PhiBalancer


logger = logging.get_logger(__name__)
SILENT = 8  # warns after this many optimizer steps without a backward through the routers
WRONG_NUMBER = (
    "{} optimizer step(s) so far had other tokens than begin_step() was told, so they received another coefficient than the "
    "configured one. Pass begin_step() the batches as the model gets them, or announce nothing where a step has one backward."
)
NOT_FINITE = (
    "The routing statistics of {} step(s) were not finite (the loss or the router logits diverged); they were left out of the "
    "means and prices. Lower the learning rate or check the data."
)
PADDED = (
    "Padding is counted as tokens: rows of input_ids end or begin with several pad tokens (id {}), and the model got no "
    "attention_mask. Pass it, or set token_mask='labels' in PhiBalanceConfig."
)


class Loop:
    """The optimizer steps of one balancer."""

    def __init__(self, balancer: PhiBalancer) -> None:
        self.balancer = balancer
        self.is_checked = False  # whether `check_first_step` has passed
        self.idle_steps = 0  # of optimizers that own parameters, since the last backward through the routers
        self._unseen_steps, self._version = 0, -1  # weight changes without a step of torch's optimizers
        self._ended = 0  # steps
        self.ends_after = -1  # number of the backward that ends a step, if optimizers step inside it
        self._held: set[int] = set()  # ids of the model's parameters that the optimizers hold which have stepped
        self._owners: weakref.WeakKeyDictionary[Any, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._now: OptimizerStep | None = None  # made lazily: in the middle of a copy there are no duals yet
        self._last: Counts | None = None
        # number of steps with wrong N, with non-finite statistics, with counted padding: on the device, and as read last
        self._faults = self._faults_read = torch.zeros(3)
        self._said = [0, 0]

    @property
    def now(self) -> OptimizerStep:
        """The current optimizer step."""
        if self._now is None:
            self._now = OptimizerStep(self._counts(), self.balancer.ranks, self.balancer.config.only_counts)
        return self._now

    @property
    def last(self) -> Counts:
        """Counts of the last step, over all ranks."""
        if self._last is None:
            self._last = self._counts()
        return self._last

    def _counts(self) -> Counts:
        return Counts(self.balancer.duals.shape, self.balancer.duals.values.device, self.bins)

    @property
    def bins(self) -> int:
        """Number of histogram bins per expert that the method needs."""
        config = self.balancer.config
        return BINS if config.rules.bias_rule == "quantile" and config.bias_coef > 0 else 0

    # ------------------------------------------------------------------ the beginning of a step

    def begin(self, micro_batches: Sequence[Any] | int, by_part: bool, share: float) -> None:
        """See [`PhiBalancer.begin_step`]."""
        is_number = isinstance(micro_batches, int) and not isinstance(micro_batches, bool)
        if not is_number and (isinstance(micro_batches, str) or not isinstance(micro_batches, Sequence)):
            one = isinstance(micro_batches, (Mapping, Tensor))
            raise ValueError(
                f"`micro_batches` must be a list of batches or their number, got a {type(micro_batches).__name__}: "
                f"{'pass [batch]' if one else 'draw the batches of the step first, list(...), since counting them would use them up'}."
            )
        number = micro_batches if isinstance(micro_batches, int) else len(micro_batches)
        if number < 1:
            raise ValueError(f"`micro_batches` must hold at least one micro-batch, got {micro_batches!r}.")
        if self.now.settled == 0:
            self._now = None
        elif self._is_given_up() or not any(p.grad is not None and p.grad.any() for p in self._trained()):
            self._give_up()  # all None, or all zero after zero_grad(set_to_none=False)
        elif self.now.number is not None:
            logger.warning_once(
                "begin_step() came again, but no optimizer of the model has stepped since the last one. The step goes on, over "
                "the end of a pass (epoch) through the data perhaps, and its coefficient is shared. If the optimizer is not "
                "one of torch's, call balancer.step() after it has stepped; after a step that was given up, discard_step()."
            )
        parts = [] if isinstance(micro_batches, int) else [self._tokens_of(batch) for batch in micro_batches]
        counted = [part for part in parts if part is not None]
        if counted and len(counted) == number:
            tokens = self.balancer.sum_over_ranks(torch.stack(counted).sum())
            self.now.announce(number, tokens, counted if by_part else None, share)
            return
        if not is_number:
            logger.warning_once(
                f"The micro-batches do not hold what token_mask={self.balancer.config.token_mask!r} needs; each will get the mean "
                "over its own tokens instead of its exact share of the step's."
            )
        self.now.announce(number, share=share)

    def _tokens_of(self, batch: Any) -> Tensor | None:
        """Returns the number of tokens that count in a micro-batch, `()`; `None` if it cannot be known."""
        balancer = self.balancer
        masks = announced_masks(batch, balancer.config.token_mask, balancer.pad_token_id)
        if not masks:
            return None
        number = torch.stack([mask.sum(dtype=torch.float32).to(balancer.duals.values.device) for mask in masks]).sum()
        in_front = 0 if balancer.config.token_mask == "labels" else balancer.virtual_tokens or 0
        return number + in_front * sum(len(mask) for mask in masks)

    def continue_or_begin(self, micro_batch: int | None) -> None:
        """Called when a training forward begins. Begins a new step, or a Trainer's step anew, if the current one was given up."""
        process.wrap_imported()
        if self.now.counts.flat.device != self.balancer.duals.values.device:
            self._now = self._last = None
        elif self.now.settled and self.now.number is None and self._is_given_up():
            self._give_up()
        elif micro_batch in self.now.served and self._is_given_up():
            self.now.restart()
        probe = next(self._trained(), None)
        self._version = -1 if probe is None else probe._version

    def discard(self) -> None:
        self._now = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: inside it another step begins; afterwards the present one continues."""
        step, idle, self._now = self._now, self.idle_steps, None
        try:
            yield
        finally:
            self._now, self.idle_steps = step, idle

    def _trained(self) -> Iterator[Tensor]:
        return (p for p in self.balancer.root.parameters() if p.requires_grad)

    def _is_given_up(self) -> bool:
        """Whether the gradients of the current step are gone."""
        trained = list(self._trained())
        if not trained:  # only an optimizer of prompts could end its steps
            return self.balancer.virtual_tokens is None
        return all(p.grad is None for p in trained)

    def _give_up(self) -> None:
        """Discards a step whose gradients are gone. Warns if an optimizer that is not torch's seems to have used them."""
        self._now = None
        probe, name = next(self._trained(), None), type(self.balancer.root).__name__
        self._unseen_steps += probe is None or (probe._version != self._version and not process.is_stepping)
        if self._unseen_steps == SILENT and probe is None:
            logger.warning(
                f"{name} trains nothing itself, so its means and biases do not move. If PEFT trains prompts in front "
                "of it, call phb.get_balancer(model) with the PEFT model."
            )
        elif self._unseen_steps == SILENT:
            logger.warning(
                f"The weights of {name} have changed {SILENT} times, but no optimizer of torch's has stepped, so "
                "the prices never move. Call phb.get_balancer(model).step() after the optimizer has stepped."
            )

    # ------------------------------------------------------------------ its end

    def is_owned_by(self, optimizer: Any) -> bool:
        """Whether `optimizer` owns parameters of the model."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        number, owns = self._owners.get(optimizer, (-1, False))
        if number != len(parameters):
            held = {id(p) for p in self.balancer.root.parameters()} & {id(p) for p in parameters}
            self._held |= held
            owns = bool(held)
            self._owners[optimizer] = len(parameters), owns
        return owns

    def optimizer_has_stepped(self, optimizer: Any, skipped: Tensor | None) -> None:
        """Ends the step if `optimizer` owns parameters of the model; in prompt learning, where it trains none, in any case."""
        if not self.is_owned_by(optimizer) and not (self.now.settled and self.balancer.virtual_tokens is not None):
            return
        if self.now.settled == 0:
            self.idle_steps += 1
            if self.idle_steps == SILENT:
                self._say_silence()
        self.end(skipped)

    def end(self, skipped: Tensor | bool | None = None) -> None:
        """Ends the current step on all ranks. `skipped`: whether this rank's optimizer skipped it, a tensor if only the device knows."""
        balancer, step, shared = self.balancer, self.now, self.balancer.ranks > 1
        if not step.settled and not (step.tokens is not None and shared):
            return
        self._now = None
        if skipped is True and not shared:
            return
        counts, is_first = step.counts, not self.is_checked
        if skipped is not None:
            counts.skipped.copy_((torch.as_tensor(skipped) != 0).any())
        if is_first:
            self._check_ranks(counts.flat.device)
        balancer.sum_over_ranks(counts.flat)
        if is_first:
            balancer.find_copies()
            self.is_checked = check_first_step(balancer.config, balancer.sites, counts, step.added, step.second_order)
            warn_of_rounded_routers(balancer.sites)
        self._unseen_steps, self._ended = 0, self._ended + 1
        self._say_unbalanced(step)
        self._notice_faults(step, counts)
        if is_first:  # which has waited for the device anyway
            self.say_faults()
        if balancer.watcher is not None:
            balancer.watcher(counts)
        balancer.duals.use_adapter(step.adapter)  # the adapter may be off now, for a reference model
        may_be_skipped = shared or isinstance(skipped, Tensor)
        balancer.duals.update(counts, may_be_skipped)
        balancer.follow_adapter()
        if may_be_skipped:  # keep the counts of the step before a skipped one
            counts.flat.copy_(torch.where(counts.skipped > 0, self.last.flat, counts.flat))
        self._last = counts

    def _check_ranks(self, device: torch.device) -> None:
        """Raises `ValueError` on every rank if routers or configuration are not the same on all of them."""
        config, sites = self.balancer.config, self.balancer.sites
        if self.balancer.world_size == 1:
            return
        mine = f"{[(site.name, site.num_experts) for site in sites]} {config.to_dict()}"
        digest = int.from_bytes(hashlib.sha256(mine.encode()).digest()[:7], "big")
        bounds = torch.tensor([digest, -digest], device=device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.balancer.process_group)
        if bounds[0] != -bounds[1]:
            raise ValueError(
                f"the ranks of this optimizer step have different routers or configurations. This one has {len(sites)} "
                f"router(s), {', '.join(site.name for site in sites[:2])}, ..., and {config}. Patch the whole model with the same "
                "configuration on every rank; stages of a pipeline, which hold some of the layers, cannot be balanced."
            )

    # ------------------------------------------------------------------ warnings

    def _say_unbalanced(self, step: OptimizerStep) -> None:
        """Warns if `step` received less than its coefficient, or if no optimizer holds the parameters that balancing moves."""
        if complaint := step.complaint:
            logger.warning_once(complaint)
        if not self.balancer.config.adds_gradient:
            return
        if any(step.members) and not all(step.members):
            logger.warning_once(
                "A training forward that was alive during the backward got none of it, and was counted all the same, so the step received "
                "less than its coefficient. Run forwards for metrics under torch.no_grad(), or drop what they returned."
            )
        if step.second_order and not step.added:
            logger.warning_once(
                "The backward of an optimizer step was run with create_graph=True alone, so the price gradient was not added in "
                "it; the means have moved."
            )
        if self._ended != SILENT:
            return
        routers = {id(p) for site in self.balancer.sites for m in site.modules for p in m.parameters()}
        given = [(n, p) for n, p in self.balancer.root.named_parameters() if p.requires_grad and p.grad is not None]
        of_routers = [(name, p) for name, p in given if id(p) in routers]
        given = of_routers or given
        left = [name for name, p in given if id(p) not in self._held]
        if self._held and left and (of_routers or len(left) == len(given)):
            logger.warning(
                f"{len(left)} of {len(given)} parameters that balancing is to move have a gradient, but no optimizer that has stepped "
                f"holds them: {', '.join(left[:2])}, ... They stay as they are. Make the optimizer when all adapters are added, and "
                "of all parameters that are trained."
            )

    def _notice_faults(self, step: OptimizerStep, counts: Counts) -> None:
        """Warns of wrong announcements and non-finite statistics; a step later, so as not to wait for the device."""
        expected = counts.tokens if step.expected is None else step.expected
        wrong, bad = (counts.tokens - expected).abs() > 0.5, ~torch.isfinite(counts.flat).all()
        self.say_faults(read=False)
        faults = torch.stack([wrong, bad, counts.padding > 0]).to(torch.float32)
        self._faults = self._faults.to(faults.device) + faults
        self._faults_read = self._faults.to("cpu", non_blocking=True)

    def say_faults(self, read: bool = True) -> None:
        """Warns of the faults so far. Reads the device, or else takes what was read last."""
        self._faults_read = self._faults.cpu() if read else self._faults_read
        wrong, bad, padded = self._faults_read.tolist()
        if padded:
            logger.warning_once(PADDED.format(self.balancer.pad_token_id))
        for index, (number, text) in enumerate(((wrong, WRONG_NUMBER), (bad, NOT_FINITE))):
            if number >= max(1, 2 * self._said[index]):  # warn at the first, then each time the number has doubled
                self._said[index] = int(number)
                logger.warning(text.format(int(number)))

    def _say_silence(self) -> None:
        """Warns that no gradient comes back through the routers."""
        balancer, name = self.balancer, type(self.balancer.root).__name__
        if not any(p.requires_grad for site in balancer.sites for m in site.modules for p in m.parameters()):
            reason = "its routers are frozen, and nothing that lies below them is trained"
        elif balancer.backbone is not None and not balancer.backbone.training:
            reason = "it is in eval mode: call model.train() before training"
        else:
            reason = (
                f"no training forward of {name} had a backward: its layers run without it (a stage of "
                "torch.distributed.pipelining, which φ-balancing does not support), or under torch.no_grad()"
            )
        logger.warning(
            f"An optimizer of {name} has stepped {SILENT} times, and no gradient came back through its routers, so "
            f"nothing is balanced: {reason}."
        )
