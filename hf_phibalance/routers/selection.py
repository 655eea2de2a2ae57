"""Adds the selection bias inside a router's own forward, to the scores that its top-k ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


TOPKS = (torch.topk, Tensor.topk)
SCORES = (F.softmax, torch.softmax, Tensor.softmax, torch.sigmoid, Tensor.sigmoid, F.sigmoid)
FAINT = 1e-30  # smallest probability by which fp32 can divide, in forward and backward


class BiasedTopK(TorchFunctionMode):
    """
    While active, every `topk` over E scores ranks `scores + bias` and returns the *unbiased* values it selected.

    Routers differ in what they do around their top-k: softmax before or after, renormalisation, scaling, grouping.
    Biasing only the top-k keeps all of that, so no family needs a forward of its own. Some routers first select groups
    of experts and mask the others with 0 or -inf. The bias changes neither these groups nor the mask. With
    `zero_is_masked`, a score of 0 marks an expert outside the selected groups, even among logits.
    """

    def __init__(self, num_experts: int, bias: Tensor, zero_is_masked: bool = False) -> None:
        super().__init__()
        self.num_experts, self.bias, self.zero_is_masked = num_experts, bias, zero_is_masked
        self.scores: Tensor | None = None  # the scores ranked last (..., E), without the bias
        self.are_probs = False  # whether a softmax or a sigmoid over the experts came before the top-k

    @staticmethod
    def innermost() -> BiasedTopK | None:
        """Returns the mode entered last, if it is a `BiasedTopK`."""
        modes = torch.overrides._get_current_function_mode_stack()
        return modes[-1] if modes and isinstance(modes[-1], BiasedTopK) else None

    @staticmethod
    def leave_interrupted() -> None:
        """Leaves modes that are still active because Ctrl-C in a forward skipped the hooks."""
        modes = torch.overrides._get_current_function_mode_stack()
        if any(isinstance(mode, BiasedTopK) for mode in modes):
            for _ in modes:
                torch.overrides._pop_mode()
            for mode in modes:
                if not isinstance(mode, BiasedTopK):
                    torch.overrides._push_mode(mode)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in TOPKS:
            scores = args[0] if args else kwargs["input"]
            if scores.shape[-1] == self.num_experts:
                kwargs = {name: value for name, value in kwargs.items() if name != "input"}
                self.scores = scores
                ranked = rank_scores(scores, self.bias, self.zero_is_masked, self.are_probs)
                indices = func(ranked, *args[1:], **kwargs).indices
                return torch.return_types.topk((scores.gather(-1, indices), indices))
        result = func(*args, **kwargs)
        if func in SCORES and self.scores is None and result.shape[-1] == self.num_experts:
            self.are_probs = True
        return result


@torch.no_grad()
def rank_scores(scores: Tensor, bias: Tensor, zero_is_masked: bool = False, are_probs: bool = False) -> Tensor:
    """
    Returns the biased scores to rank, `(..., E)` in fp32.

    An expert of probability 0 (its logit is masked, or the router has collapsed) gets -inf, so no bias can select it.
    It would add nothing to the output, and renormalising a selection of only such experts would give 0/0.

    Args:
        scores (`torch.Tensor` of shape `(..., E)`): Probabilities, affinities or logits.
        bias (`torch.Tensor` of shape `(E,)`): Added to them.
        zero_is_masked (`bool`, *optional*, defaults to `False`): Whether 0 marks experts outside the selected groups.
        are_probs (`bool`, *optional*, defaults to `False`): Whether the scores are known to lie in [0, 1].
    """
    scores, bias = scores.float(), bias.to(scores.device)
    if are_probs:
        return F.threshold(scores, FAINT, float("-inf")) + bias
    ranked = scores + bias
    if zero_is_masked:
        return ranked.masked_fill(scores.abs() <= FAINT, float("-inf"))
    # Mask 0 only in rows that could be probabilities and are not all 0. Among logits, 0 is an ordinary score.
    low, high = scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
    nothing = torch.where((low >= 0) & (high > FAINT), FAINT, float("-inf"))
    return torch.where(scores <= nothing, float("-inf"), ranked)
