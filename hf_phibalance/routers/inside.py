"""What goes on inside a router's forward: its softmax is noted, and its top-k biased, without a forward of our own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


TOPKS = (torch.topk, Tensor.topk)
SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)
CASTS = (Tensor.float, Tensor.to)
FAINT = 1e-30  # a probability by which one can still divide, forwards and backwards, in fp32


class Softmax:
    """A call of softmax over the experts: its input, the tensor that the input was cast from, and its result."""

    def __init__(self, logits: Tensor, uncast: Tensor, probs: Tensor) -> None:
        self.logits, self.uncast, self.probs = logits, uncast, probs

    def is_of(self, logits: Tensor) -> bool:
        """Whether the result is the softmax of `logits`."""
        return self.logits is logits or self.uncast is logits

    def leads_to(self, output: Tensor) -> bool:
        """Whether the gradient of `output` goes back through the result, within a few operations."""
        wanted = self.probs.grad_fn
        found: set[Any] = set()
        frontier: set[Any] = {output.grad_fn}
        while frontier and wanted not in frontier and len(found) < 50:
            found |= frontier
            frontier = {node for parent in frontier if parent for node, _ in parent.next_functions} - found
        return wanted is not None and wanted in frontier


class RouterMode(TorchFunctionMode):
    """
    While active, notes the first softmax over E logits that comes before any `topk`; and every `topk` over E scores
    ranks `scores + bias` and returns the *unbiased* values it selected.

    Routers differ in what they do around their top-k (softmax before or after, renormalisation, scaling, grouping);
    biasing the one call that selects leaves all of that in place, so that no family needs a forward of its own. In
    routers that first limit the choice to some groups, masking the others with 0 or -inf, the groups are chosen
    without the bias and the limit holds.

    Args:
        num_experts (`int`): E.
        bias (`torch.Tensor` of shape `(E,)`, *optional*): added to the scores, in fp32.
        zero_is_masked (`bool`): whether a score of 0 marks an expert outside the chosen groups, whatever is ranked.
        notes_softmax (`bool`): whether to look for the softmax.
        are_probs (`bool`, *optional*): whether the scores lie in [0, 1], if that is known.
    """

    def __init__(
        self,
        num_experts: int,
        bias: Tensor | None,
        zero_is_masked: bool = False,
        notes_softmax: bool = False,
        are_probs: bool | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.bias = bias
        self.zero_is_masked = zero_is_masked
        self.are_probs = are_probs
        self.notes_softmax = notes_softmax
        self.softmax: Softmax | None = None
        self.scores: Tensor | None = None  # what was ranked last, without the bias
        self._cast: tuple[Tensor, Tensor] | None = None  # the latest: its result, and what it was cast from

    @staticmethod
    def innermost() -> RouterMode | None:
        """The mode entered last, if it is one of ours."""
        modes = torch.overrides._get_current_function_mode_stack()
        return modes[-1] if modes and isinstance(modes[-1], RouterMode) else None

    @staticmethod
    def leave_interrupted() -> None:
        """Leaves the modes that are still active because Ctrl-C ended a forward: it runs no hook of a module."""
        modes = torch.overrides._get_current_function_mode_stack()
        if any(isinstance(mode, RouterMode) for mode in modes):
            for _ in modes:
                torch.overrides._pop_mode()
            for mode in modes:
                if not isinstance(mode, RouterMode):
                    torch.overrides._push_mode(mode)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in TOPKS and self.bias is not None:
            scores = args[0] if args else kwargs["input"]
            if scores.shape[-1] == self.num_experts:
                kwargs = {name: value for name, value in kwargs.items() if name != "input"}
                self.scores = scores
                self.notes_softmax = False
                ranked = rank_scores(scores, self.bias, self.zero_is_masked, self.are_probs)
                indices = func(ranked, *args[1:], **kwargs).indices
                return torch.return_types.topk((scores.gather(-1, indices), indices))
        result = func(*args, **kwargs)
        if self.notes_softmax:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func, args: tuple, kwargs: dict, result: Tensor) -> None:
        if func in CASTS and args:
            self._cast = result, args[0]
        elif func in TOPKS:
            self.notes_softmax = False
        elif func in SOFTMAXES and result.shape[-1] == self.num_experts:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            logits = args[0] if args else kwargs["input"]
            if dim in (-1, result.ndim - 1):
                uncast = self._cast[1] if self._cast is not None and self._cast[0] is logits else logits
                self.softmax = Softmax(logits, uncast, result)
            self.notes_softmax = False


@torch.no_grad()
def rank_scores(scores: Tensor, bias: Tensor, zero_is_masked: bool = False, are_probs: bool | None = None) -> Tensor:
    """
    What the biased selection ranks, `(..., E)` in fp32.

    An expert of no probability (its logit is masked, or far below that of a router that has collapsed) would have no part
    in the output, and weights that are renormalised over such experts only are 0/0. So no bias is enough for it.

    Args:
        scores (`torch.Tensor` of shape `(..., E)`): probabilities, affinities or logits.
        bias (`torch.Tensor` of shape `(E,)`): what is added to them.
        zero_is_masked (`bool`, *optional*, defaults to `False`): whether 0 marks an expert outside the chosen groups.
        are_probs (`bool`, *optional*): whether the scores lie in [0, 1], if that is known; it saves kernels.
    """
    scores, bias = scores.float(), bias.to(scores.device)
    if are_probs:
        return F.threshold(scores, FAINT, float("-inf")) + bias
    ranked = scores + bias
    if zero_is_masked:
        return ranked.masked_fill(scores.abs() <= FAINT, float("-inf"))
    if are_probs is not None:
        return ranked  # where logits are ranked, 0 is one like any other
    # So only in rows that could be of probabilities, and are not all 0.
    low, high = scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
    nothing = torch.where((low >= 0) & (high > FAINT), FAINT, float("-inf"))
    return torch.where(scores <= nothing, float("-inf"), ranked)
