"""
An optimizer step and its training forwards: how many tokens N it has, and what each of them weighs.

A step begins with the first training forward after the last one has ended, and ends when an optimizer that owns parameters
of the model has stepped. Its N is

    announced by batches    `begin_step(batches)` has counted the tokens, over all ranks; each weighs 1/N
    announced by number     each of so many backwards gets 1/number of the coefficient
    not announced           the step has one backward, and N is counted over the forwards that are alive when it comes

A Trainer also says which micro-batch each forward and backward belongs to. Micro-batch k then gets n_k/N of the coefficient,
n_k being its announced tokens, whatever its forwards see (generated tokens, every token twice).
"""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .counts import Counts
from .process import next_node
from .tokens import Tokens


logger = logging.get_logger(__name__)
_keys = itertools.count(1)


class Forward:
    """
    One training forward of the backbone. Only its autograd graph keeps it alive, so a forward whose graph is gone neither
    counts nor adds a gradient.

    Args:
        step (`OptimizerStep`): the step that it belongs to.
        tokens (`Tokens`): its tokens.
        number (`torch.Tensor` of shape `()`): how many of them count, over all ranks.
        micro_batch (`int`, *optional*): the micro-batch that it belongs to, where a Trainer says so.
    """

    def __init__(self, step: OptimizerStep, tokens: Tokens, number: Tensor, micro_batch: int | None = None) -> None:
        self.step, self.tokens, self.number, self.micro_batch = step, tokens, number, micro_batch
        self.counts = step.counts.like()  # of its routers; they enter the step when its backward comes
        self.counts.tokens.copy_(tokens.count)
        self.share: Tensor | None = None  # () weight of a token, 1/N, once a backward has come
        self.price: Tensor | None = None  # (L, E) coef · q, from then on
        self._weights: tuple[Any, dict[int, Tensor]] = (None, {})  # of a loss scale: weight of each token, by mask
        self.added: set[int] = set()  # routers that have added their gradient
        self.first_node = next_node()  # of the autograd nodes that it makes
        self.key = 0  # by which compiled code knows it
        self.adapter: str | None = None  # that was switched on

    def weights(self, mask: Tensor) -> Tensor:
        """Weight 1/N of each token of `mask (T,)`, times the loss scale of its step."""
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
    """
    What is known of the optimizer step under way.

    Args:
        counts (`Counts`): empty ones.
        ranks (`int`): over which gradients are averaged.
    """

    def __init__(self, counts: Counts, ranks: int) -> None:
        self.counts, self.ranks = counts, ranks
        self.number: int | None = None  # of micro-batches, where announced
        self.tokens: Tensor | None = None  # () N, where announced by batches
        self.expected: Tensor | None = None  # () tokens of all announcements, if all told them
        self.parts: list[Tensor] | None = None  # () announced tokens of each micro-batch on this rank, in a Trainer
        self.loss_scale: float | Tensor = 1.0  # of a scaler that is not torch's
        self.settled = 0  # micro-batches whose backward has come, ...
        self.first = 0  # ... of which so many belong to earlier announcements
        self.left, self.share = (
            1.0,
            1.0,
        )  # of the coefficient: what is left for this announcement, and its share of that
        self.paid: set[int] = set()  # micro-batches of a Trainer that have had their part
        self.adapter: str | None = None  # that is trained: of the first forward whose backward has come
        self.members: list[set[int]] = []  # for each settled forward, the routers that have added their gradient
        self.scaler: Any = None  # that scaled its loss
        self.second_order = False  # a backward with create_graph came
        self.added: set[int] = set()  # routers that have added a gradient
        self._alive: list[weakref.ref[Forward]] = []
        self.numbered: weakref.WeakValueDictionary[int, Forward] = weakref.WeakValueDictionary()  # for compiled code
        self.kept: list[Forward] = []  # whose autograd graph, being compiled, does not keep them alive

    # ------------------------------------------------------------------ announcing

    def announce(
        self,
        number: int,
        tokens: Tensor | None = None,
        parts: list[Tensor] | None = None,
        loss_scale: float | Tensor = 1.0,
        share: float = 1.0,
    ) -> None:
        """
        Announces the micro-batches that come now; those of an earlier announcement keep what they have been given.

        Args:
            number (`int`): how many they are.
            tokens (`torch.Tensor` of shape `()`, *optional*): tokens that count in them, over all ranks.
            parts (`list[torch.Tensor]`, *optional*): those of each on this rank, if a Trainer says which one is under way.
            loss_scale (`float` or `torch.Tensor`, *optional*, defaults to `1.0`): by which their gradients will be divided.
            share (`float`, *optional*, defaults to `1.0`): of what is left of the coefficient; less if more will be announced.
        """
        if self.settled:
            self.left *= 1 - self.share
            self.expected = None if self.expected is None or tokens is None else self.expected + tokens
        else:
            self.expected = tokens
        self.number, self.tokens, self.parts, self.loss_scale, self.share = number, tokens, parts, loss_scale, share
        self.first, self.paid = self.settled, set()

    # ------------------------------------------------------------------ forwards

    def open(self, tokens: Tokens, number: Tensor, micro_batch: int | None) -> Forward:
        forward = Forward(self, tokens, number, micro_batch)
        self._alive = [reference for reference in self._alive if reference() is not None]
        self._alive.append(weakref.ref(forward))
        forward.key = 2 * next(_keys)
        self.numbered[forward.key] = forward
        return forward

    def drop(self, forward: Forward) -> None:
        """Forgets a forward that was ended by an exception, whose traceback may keep it alive."""
        self._alive = [reference for reference in self._alive if reference() is not forward]

    def find(self, node: int) -> Forward | None:
        """The forward that the autograd node with this number recomputes: the last that had begun before it."""
        begun = [f for reference in self._alive if (f := reference()) is not None and f.first_node <= node]
        return max(begun, key=lambda f: f.first_node, default=None)

    def settle(self, forward: Forward) -> list[Forward]:
        """
        The backward of `forward` has come: sets the weight of the tokens of all forwards that it may reach, each alike, and
        returns these. Their counts enter the step.

        Raises:
            RuntimeError: if nothing was announced and the step has had a backward already.
        """
        if forward.share is not None:
            return []
        alive = [f for reference in self._alive if (f := reference()) is not None and f.share is None]
        group = [f for f in alive if f.micro_batch == forward.micro_batch]
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
        """Weight of a token among `tokens () ` that are settled together."""
        scale, index = self.ranks * self.left * self.share, forward.micro_batch
        number = self.number or accelerate_steps()
        if index is not None:
            if index in self.paid:
                return torch.zeros_like(tokens)
            self.paid.add(index)
        if self.tokens is not None:
            announced = self.tokens.clamp(min=1)
            if self.parts is not None and index is not None and index < len(self.parts):
                return scale * self.parts[index] / (announced * tokens)
            return scale / announced
        if index is None and self.settled - self.first >= number:
            raise RuntimeError(
                f"this is backward number {self.settled - self.first + 1} of an optimizer step that was to have {number}, so each "
                "token's share of the coefficient is not known. Call get_balancer(model).begin_step(batches), or "
                "begin_step(number of micro-batches), before the first forward of the step. After a step that was given up, "
                "call discard_step()."
            )
        return scale / (number * tokens)


def accelerate_steps() -> int:
    """Micro-batches of a step in a loop with accelerate's `accumulate`, which divides the loss by the same number."""
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None or not accelerate.GradientState._shared_state:
        return 1
    return accelerate.GradientState().num_steps


def check_numbers(step: OptimizerStep) -> str | None:
    """What an announcement by number got wrong, as the host knows when the step ends."""
    number = step.number or accelerate_steps()
    if step.tokens is not None or step.settled - step.first == number:
        return None
    return (
        f"an optimizer step of {number} announced micro-batches had {step.settled - step.first} backwards, so it received "
        f"{(step.settled - step.first) / number:.2f} of the coefficient. Announce as many as there are: begin_step(batches)."
    )
