"""Biasing which experts a router selects without touching the weights it gives them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SelectionBias(TorchFunctionMode):
    """
    While active, every `topk` over E scores ranks `scores + bias` and returns the *unbiased* values it selected.

    Routers differ in what they do around their top-k (softmax before or after, renormalisation, scaling, grouping);
    biasing the one call that selects leaves all of that in place, so that no family needs a forward of its own. In
    routers that first limit the choice to some groups, masking the others with 0 or -inf, the groups are chosen
    without the bias and the limit holds.

    Args:
        bias (`torch.Tensor` of shape `(E,)`): added to the scores, in fp32.
        zero_is_masked (`bool`): whether a score of exactly 0 marks an expert outside the chosen groups.
    """

    def __init__(self, bias: Tensor, zero_is_masked: bool = False) -> None:
        super().__init__()
        self.bias = bias
        self.zero_is_masked = zero_is_masked
        self.scores: Tensor | None = None  # what was ranked last, without the bias

    @staticmethod
    def innermost() -> SelectionBias | None:
        """The mode entered last, if it is one of ours."""
        modes = torch.overrides._get_current_function_mode_stack()
        return modes[-1] if modes and isinstance(modes[-1], SelectionBias) else None

    @staticmethod
    def leave_interrupted() -> None:
        """Leaves the modes that are still active because Ctrl-C ended a forward: it runs no hook of a module."""
        modes = torch.overrides._get_current_function_mode_stack()
        if any(isinstance(mode, SelectionBias) for mode in modes):
            for _ in modes:
                torch.overrides._pop_mode()
            for mode in modes:
                if not isinstance(mode, SelectionBias):
                    torch.overrides._push_mode(mode)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            scores = args[0] if args else kwargs["input"]
            if scores.shape[-1] == self.bias.numel():
                kwargs = {name: value for name, value in kwargs.items() if name != "input"}
                self.scores = scores
                ranked = rank_scores(scores, self.bias, self.zero_is_masked)
                indices = func(ranked, *args[1:], **kwargs).indices
                return torch.return_types.topk((scores.gather(-1, indices), indices))
        return func(*args, **kwargs)


@torch.no_grad()
def rank_scores(scores: Tensor, bias: Tensor, zero_is_masked: bool = False) -> Tensor:
    """What the biased selection ranks, `(..., E)` in fp32."""
    ranked = scores.float() + bias.to(scores.device)
    return ranked.masked_fill(scores == 0, float("-inf")) if zero_is_masked else ranked
