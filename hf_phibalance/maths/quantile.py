"""Quantile balancing: the selection bias with which every expert would have been chosen its fair share of times.

Expert e is among the top-k of a token if s_e + b_e exceeds the token's cutoff, the (k+1)-th largest biased score. Its
margin, cutoff - s_e, is therefore the bias that it needs there, and the k/E quantile of its margins over the tokens is
the bias that wins it a fair share (Su 2026, "Quantile Balancing"; Kimi K3 report, Eqs. 13-14). The margins are kept as a
histogram per expert, which is a plain sum over tokens, so the answer does not depend on how a step is split.

Shapes: L routers, T tokens, E experts, H bins.
"""

from __future__ import annotations

import torch
from torch import Tensor


BINS = 1000


def margin_range(bias_LE: Tensor, width_L1: Tensor) -> tuple[Tensor, Tensor]:
    """
    Bounds `(L, 1)` of the margins: scores that span at most `width` cannot leave them.

    Args:
        bias_LE (`torch.Tensor` of shape `(L, E)`): the bias in force.
        width_L1 (`torch.Tensor` of shape `(L, 1)`): the span of the scores, 1 for probabilities.
    """
    return bias_LE.amin(-1, keepdim=True) - width_L1, bias_LE.amax(-1, keepdim=True) + width_L1


def margin_histogram(scores: Tensor, bias: Tensor, top_k: int, mask: Tensor, width: float) -> Tensor:
    """
    Histogram of the margins of one router.

    Args:
        scores (`torch.Tensor` of shape `(T, E)`): what the router ranks, without the bias.
        bias (`torch.Tensor` of shape `(E,)`): the bias in force.
        top_k (`int`): experts per token, fewer than E.
        mask (`torch.Tensor` of shape `(T,)`): weight of each token, 0 for those that do not count.
        width (`float`): span of the scores; margins outside the range fall into the first or last bin.

    Returns:
        `torch.Tensor` of shape `(E, H)`: weights summed by bin.
    """
    experts = scores.shape[-1]
    low, high = (bound.squeeze() for bound in margin_range(bias.unsqueeze(0), bias.new_full((1, 1), width)))
    cutoff_T1 = (scores + bias).topk(top_k + 1, dim=-1).values[:, -1:]
    place_TE = (cutoff_T1 - scores - low) * (BINS / (high - low))
    place_TE = place_TE.clamp_(max=BINS).long().clamp_(0, BINS - 1)  # a masked expert, of score -inf, would need +inf
    place_TE += torch.arange(experts, device=scores.device) * BINS
    weight_TE = mask.unsqueeze(-1).expand_as(place_TE)
    counts = torch.zeros(experts * BINS, device=scores.device)
    return counts.scatter_add_(0, place_TE.reshape(-1), weight_TE.reshape(-1)).view(experts, BINS)


def quantile_bias(histogram_LEH: Tensor, top_k_L1: Tensor, bias_LE: Tensor, width_L1: Tensor) -> Tensor:
    """
    The k/E quantiles of the margins, interpolated within their bins and centred, `(L, E)`.

    Args:
        histogram_LEH (`torch.Tensor` of shape `(L, E, H)`): of all tokens of a step; without tokens the bias stays.
        top_k_L1 (`torch.Tensor` of shape `(L, 1)`): experts per token.
        bias_LE (`torch.Tensor` of shape `(L, E)`): the bias that was in force.
        width_L1 (`torch.Tensor` of shape `(L, 1)`): as in [`margin_histogram`].
    """
    low_L1, high_L1 = margin_range(bias_LE, width_L1)
    below_LEH = histogram_LEH.cumsum(-1)
    total_LE = below_LEH[..., -1]
    target_LE1 = (total_LE * top_k_L1 / bias_LE.shape[-1]).unsqueeze(-1)
    place_LE1 = torch.searchsorted(below_LEH, target_LE1).clamp_(max=BINS - 1)
    inside_LE1 = histogram_LEH.gather(-1, place_LE1)
    before_LE1 = below_LEH.gather(-1, place_LE1) - inside_LE1
    part_LE = ((target_LE1 - before_LE1) / inside_LE1.clamp(min=1e-30)).clamp_(0, 1).squeeze(-1)
    quantile_LE = low_L1 + (place_LE1.squeeze(-1) + part_LE) * (high_L1 - low_L1) / BINS
    centred_LE = quantile_LE - quantile_LE.mean(-1, keepdim=True)
    return torch.where(total_LE > 0, centred_LE, bias_LE)
