"""
Steps of the selection bias: the target of quantile balancing, and the limit of every step.

Shapes: L routers, T tokens, E experts, H bins of a histogram.
"""

from __future__ import annotations

import torch
from torch import Tensor


BINS = 1000
ROUNDING = 1e-4  # a bias beyond its reach by less than this share got there by rounding, which must not add up


def margin_histogram(scores: Tensor, bias: Tensor, top_k: int, mask: Tensor, width: float) -> Tensor:
    """
    Returns the histogram of the margins of one router, for [`quantile_bias`].

    Expert e is among the top-k of a token if s_e + b_e exceeds the token's cutoff, its (k+1)-th largest biased score. The margin
    cutoff - s_e is therefore the bias that the expert needs there. A histogram is a sum over tokens, so the result does not depend
    on how a step is split. Takes `scores (T, E)` without the bias, the current `bias (E,)`, the weight of each token `mask (T,)`
    and the span of the scores `width` (1 for probabilities). Returns weights summed by bin, `(E, H)`.
    """
    experts = scores.shape[-1]
    low, high = (bound.squeeze() for bound in _margin_range(bias.unsqueeze(0), bias.new_full((1, 1), width)))
    cutoff_T1 = (scores + bias).topk(top_k + 1, dim=-1).values[:, -1:]
    place_TE = (cutoff_T1 - scores - low) * (BINS / (high - low))
    place_TE = (
        place_TE.clamp_(max=BINS).long().clamp_(0, BINS - 1)
    )  # the margin of a masked expert (score -inf) is inf
    place_TE += torch.arange(experts, device=scores.device) * BINS
    weight_TE = mask.unsqueeze(-1).expand_as(place_TE)
    counts = torch.zeros(experts * BINS, device=scores.device)
    return counts.scatter_add_(0, place_TE.reshape(-1), weight_TE.reshape(-1)).view(experts, BINS)


def quantile_bias(histogram_LEH: Tensor, top_k_L1: Tensor, bias_LE: Tensor, width_L1: Tensor) -> Tensor:
    """
    Returns the bias `(L, E)` with which every expert would have been chosen its fair share of times: the k/E quantile of its
    margins, interpolated within its bin and centred (Su 2026, "Quantile Balancing"; Kimi K3 report, Eqs. 13-14).

    Takes the margins of all tokens of a step, the experts per token, the bias during the step and the span of the scores. Without
    tokens the bias stays.
    """
    low_L1, high_L1 = _margin_range(bias_LE, width_L1)
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


def _margin_range(bias_LE: Tensor, width_L1: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bounds `(L, 1)` of the margins of scores that span at most `width`."""
    return bias_LE.amin(-1, keepdim=True) - width_L1, bias_LE.amax(-1, keepdim=True) + width_L1


def step_within(bias_LE: Tensor, step_LE: Tensor, reach_LE: Tensor) -> Tensor:
    """
    Returns `bias + step`, projected so that every bias stays within its reach of the router's mean bias, `(L, E)`.

    This prevents wind-up. The bias sums up prices. If the selection cannot answer it (an expert is masked, or a frozen router sees
    few tokens), the sum would grow without limit and take as long to come back.

    The mean of a router is that of `bias + step`: experts with room take what others must not. An expert that a checkpoint brought
    beyond its reach may come back, but goes no farther. If nothing is out of reach, the result is `bias + step` bit for bit. A step
    longer than twice the reach gives only the direction.
    """
    off_LE = _off_mean(bias_LE).abs()
    limit_LE = torch.where(off_LE > reach_LE * (1 + ROUNDING), off_LE, reach_LE)
    longest_L1 = step_LE.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    moved_LE = bias_LE + step_LE * (2 * limit_LE.amax(dim=-1, keepdim=True) / longest_L1).clamp(max=1.0)
    off_LE = _off_mean(moved_LE)
    beyond_L1 = (off_LE.abs() > limit_LE).any(dim=-1, keepdim=True)
    within_LE = (off_LE - _shift(off_LE, limit_LE)).clamp(-limit_LE, limit_LE)
    return torch.where(beyond_L1, moved_LE - off_LE + within_LE, moved_LE)


def _off_mean(values_LE: Tensor) -> Tensor:
    return values_LE - values_LE.mean(dim=-1, keepdim=True)


def _shift(values_LE: Tensor, limit_LE: Tensor) -> Tensor:
    """
    Returns the λ `(L, 1)` with Σ_e clamp(values_e - λ, ±limit_e) = 0.

    The sum starts at Σ limit and falls with λ. Its slope is the number of experts inside their limits, so it is linear between
    the points at which an expert enters or leaves its limits.
    """
    points_LP, order_LP = torch.cat([values_LE - limit_LE, values_LE + limit_LE], dim=-1).sort(dim=-1)
    entering_LP = torch.cat([torch.ones_like(values_LE), -torch.ones_like(values_LE)], dim=-1).gather(-1, order_LP)
    inside_LP = entering_LP.cumsum(dim=-1)  # behind each point
    falls_LP = (inside_LP[:, :-1] * points_LP.diff(dim=-1)).cumsum(dim=-1)
    sums_LP = limit_LE.sum(dim=-1, keepdim=True) - torch.nn.functional.pad(falls_LP, (1, 0))
    last_L1 = (sums_LP >= 0).sum(dim=-1, keepdim=True) - 1
    return points_LP.gather(-1, last_L1) + sums_LP.gather(-1, last_L1) / inside_LP.gather(-1, last_L1).clamp(min=1)
