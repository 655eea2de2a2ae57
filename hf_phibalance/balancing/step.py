"""
An optimizer step and its training forwards: the number N of its tokens, and the weight of each token.

A step begins with the first training forward after the previous step, and ends when an optimizer that owns parameters of the
model has stepped. Its N is

    announced by batches    `begin_step(batches)` counts the tokens over all ranks; each token has weight 1/N
    announced by number     each backward gets 1/number of the coefficient
    not announced           the step has one backward; N is the number of tokens of the forwards alive then

A Trainer also says which micro-batch each forward and backward belongs to. Micro-batch k then gets n_k/N of the coefficient,
where n_k is its announced number of tokens, even if its forwards see other tokens (generated ones, or each token twice).
"""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor

from .counts import Counts
from .process import next_node
from .tokens import Tokens


_keys = itertools.count(1)


class Forward:
    """
    One training forward of the backbone. Only its autograd graph keeps it alive: without the graph it neither counts nor adds
    a gradient. `number` () is how many of its `tokens` count, over all ranks.
    """

    def __init__(
        self, step: OptimizerStep, tokens: Tokens, number: Tensor, micro_batch: int | None, adapter: str | None
    ) -> None:
        self.step, self.tokens, self.number = step, tokens, number
        self.micro_batch = micro_batch  # that it belongs to, where a Trainer says so
        self.adapter = adapter  # the active one
        self.counts = step.counts.like()  # of its routers; added to the step's counts when its backward comes
        self.counts.tokens.copy_(tokens.count)
        self.share: Tensor | None = None  # () weight 1/N of a token, once a backward has come
        self.price: Tensor | None = None  # (L, E) coef · q, once a backward has come
        self.added: set[int] = set()  # routers that have added their gradient
        self.backward = -1  # number of the last backward that came to it
        self.left_gradient = False  # whether that left a gradient in the parameters
        self.first_node = next_node()  # number of the first autograd node that it makes
        self.key = 2 * next(_keys)  # its number in compiled code
        step.alive[self.key] = self
        self._weights: tuple[Any, dict[int, Tensor]] = (None, {})  # loss scale, and the token weights with it by mask

    def weights(self, mask: Tensor) -> Tensor:
        """Returns the weight 1/N of each token of `mask (T,)`, times the loss scale of its step."""
        scale = self.step.loss_scale
        assert self.share is not None
        if self._weights[0] is not scale:
            self._weights = scale, {}
        found = self._weights[1]
        if id(mask) not in found:
            factor = scale.to(self.share.device) if isinstance(scale, Tensor) else scale
            found[id(mask)] = mask * (self.share * factor)
        return found[id(mask)]


class OptimizerStep:
    """The current optimizer step: `counts` begins empty, `ranks` is the number of ranks that average gradients."""

    def __init__(self, counts: Counts, ranks: int, only_counts: bool = False) -> None:
        self.counts, self.ranks = counts, ranks
        self.only_counts = only_counts  # no weight of a token is needed, so nothing need be announced
        self.number: int | None = None  # of micro-batches, if announced
        self.tokens: Tensor | None = None  # () N, if announced by batches
        self.expected: Tensor | None = None  # () tokens of all announcements, if all were by batches
        self.parts: list[Tensor] | None = None  # () announced tokens of each micro-batch on this rank, in a Trainer
        self.loss_scale: float | Tensor = 1.0
        self.scaler: Any = None  # the GradScaler of its loss
        self.settled = 0  # micro-batches whose backward has come
        self.first = 0  # those of them that belong to earlier announcements
        self.left = 1.0  # share of the coefficient that earlier announcements have left
        self.share = 1.0  # share of `left` that this announcement gets
        self.served: set[int] = set()  # micro-batches of a Trainer that have got their part of the coefficient
        self.adapter: str | None = None  # the trained one: of the first forward whose backward has come
        self.members: list[set[int]] = []  # for each settled forward, the routers that have added their gradient
        self.second_order = False  # whether a backward with create_graph came
        self.alive: weakref.WeakValueDictionary[int, Forward] = weakref.WeakValueDictionary()  # by `key`, in order
        self.kept: list[Forward] = []  # compiled ones, which their autograd graph does not keep alive

    def announce(
        self, number: int, tokens: Tensor | None = None, parts: list[Tensor] | None = None, share: float = 1.0
    ) -> None:
        """
        Announces the next `number` of micro-batches. Those of an earlier announcement keep their weights. `tokens` () is how many
        count in them, over all ranks; `parts` the tokens of each on this rank, if a Trainer says which one is current.
        `share` of the coefficient left is below 1 if more will be announced.
        """
        if self.settled:
            self.left *= 1 - self.share
            self.expected = None if self.expected is None or tokens is None else self.expected + tokens
        else:
            self.expected = tokens
        self.number, self.tokens, self.parts, self.share = number, tokens, parts, share
        self.first, self.served = self.settled, set()

    def restart(self) -> None:
        """Forgets all backwards, whose gradients are gone. What was announced stays."""
        self.counts.flat.zero_()
        self.settled, self.served, self.members = self.first, set(), []

    def find(self, node: int) -> Forward | None:
        """Returns the forward that the autograd node with this number recomputes: the last one begun before it."""
        begun = [forward for forward in self.alive.values() if forward.first_node <= node]
        return max(begun, key=lambda forward: forward.first_node, default=None)

    def settle(self, forward: Forward) -> list[Forward]:
        """
        Handles the first backward of `forward`: sets the same token weight in all forwards that it may reach, adds their counts
        to the step, and returns them.

        Raises:
            RuntimeError: if nothing was announced and the step has had a backward already.
        """
        if forward.share is not None:
            return []
        group = [f for f in self.alive.values() if f.share is None and f.micro_batch == forward.micro_batch]
        if forward not in group:
            group.append(forward)
        share = self._share(forward, sum((f.number for f in group[1:]), group[0].number).clamp(min=1))
        self.adapter = forward.adapter if self.settled == 0 else self.adapter
        self.settled += 1
        for member in group:
            member.share = share
            self.counts.flat.add_(member.counts.flat)
            self.members.append(member.added)
        return group

    def _share(self, forward: Forward, tokens: Tensor) -> Tensor:
        """Returns the weight of a token if `tokens` () are settled together."""
        scale, index = self.ranks * self.left * self.share, forward.micro_batch
        number = self.number or accelerate_steps()
        if index is not None:
            if index in self.served:
                return torch.zeros_like(tokens)
            self.served.add(index)
        if self.tokens is not None:
            announced = self.tokens.clamp(min=1)
            if self.parts is not None and index is not None and index < len(self.parts):
                return scale * self.parts[index] / (announced * tokens)
            return scale / announced
        if index is None and self.settled - self.first >= number and not self.only_counts:
            raise RuntimeError(
                f"this is backward number {self.settled - self.first + 1} of an optimizer step that was to have {number}, so each "
                "token's share of the coefficient is not known. Call get_balancer(model).begin_step(batches), or "
                "begin_step(number of micro-batches), before the first forward of the step. After a step that was given up, "
                "call discard_step()."
            )
        return scale / (number * tokens)

    @property
    def added(self) -> set[int]:
        """Routers that have added a gradient."""
        return set().union(*self.members)

    @property
    def complaint(self) -> str | None:
        """A warning, if the step was announced by number and had another number of backwards."""
        number, came = self.number or accelerate_steps(), self.settled - self.first
        if self.tokens is not None or came == number or self.only_counts:
            return None
        return (
            f"an optimizer step of {number} announced micro-batches had {came} backwards, so it received "
            f"{came / number:.2f} of the coefficient. Announce as many as there are: begin_step(batches)."
        )


def accelerate_steps() -> int:
    """Returns the number of micro-batches by which accelerate's `accumulate` divides the loss; 1 without it."""
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.GradientState._shared_state:
        return 1
    return accelerate.GradientState().num_steps
