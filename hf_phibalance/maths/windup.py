"""
Integral control that does not wind up: a step of the selection bias, taken only as far as the scores can answer.

The bias sums up prices. Where the choice does not answer it (an expert is masked, a router is frozen on a few tokens), the
sum would grow for ever, and take as long to come back. Shapes: L routers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


ROUNDING = 1e-4  # beyond its reach a bias was brought by somebody; by less, by rounding, which must not add up


def step_within(bias_LE: Tensor, step_LE: Tensor, reach_LE: Tensor, own: float = 1.0) -> Tensor:
    """
    `bias + step`, projected onto the vectors that have its mean and keep within reach of it, `(L, E)`.

    An expert that is farther from the mean than its reach (a checkpoint has brought it there) may come back, but goes no
    farther. What one expert must not take is shared by those that have room, so that the mean of a router is that of
    `bias + step`. Where nothing is out of reach, so is the result, to the bit.

    Args:
        bias_LE (`torch.Tensor` of shape `(L, E)`): the biases in force.
        step_LE (`torch.Tensor` of shape `(L, E)`): what is to be added; of one longer than twice the reach the direction.
        reach_LE (`torch.Tensor` of shape `(L, E)`): how far a bias may be from the mean of its router.
        own (`float`, *optional*, defaults to `1.0`):
            How many times its reach a bias may have come by steps that were not held within it; so far it comes back.
    """
    off_LE = _off_mean(bias_LE).abs()
    limit_LE = torch.where(off_LE > own * reach_LE * (1 + ROUNDING), off_LE, reach_LE)
    longest_L1 = step_LE.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    moved_LE = bias_LE + step_LE * (2 * limit_LE.amax(dim=-1, keepdim=True) / longest_L1).clamp(max=1.0)
    off_LE = _off_mean(moved_LE)
    beyond_L1 = (off_LE.abs() > limit_LE).any(dim=-1, keepdim=True)
    within_LE = (off_LE - _shift(off_LE, limit_LE)).clamp(-limit_LE, limit_LE)
    return torch.where(beyond_L1, moved_LE - off_LE + within_LE, moved_LE)


def _off_mean(values_LE: Tensor) -> Tensor:
    """Differences from the mean of each router."""
    return values_LE - values_LE.mean(dim=-1, keepdim=True)


def _shift(values_LE: Tensor, limit_LE: Tensor) -> Tensor:
    """
    The λ `(L, 1)` with Σ_e clamp(values_e - λ, ±limit_e) = 0: the sum falls from Σ limit, with the slope of as many experts
    as are inside their limits, and is linear between the points at which one of them comes in or goes out.
    """
    points_LP, order_LP = torch.cat([values_LE - limit_LE, values_LE + limit_LE], dim=-1).sort(dim=-1)
    entering_LP = torch.cat([torch.ones_like(values_LE), -torch.ones_like(values_LE)], dim=-1).gather(-1, order_LP)
    inside_LP = entering_LP.cumsum(dim=-1)  # behind each point
    falls_LP = (inside_LP[:, :-1] * points_LP.diff(dim=-1)).cumsum(dim=-1)
    sums_LP = limit_LE.sum(dim=-1, keepdim=True) - torch.nn.functional.pad(falls_LP, (1, 0))
    last_L1 = (sums_LP >= 0).sum(dim=-1, keepdim=True) - 1
    return points_LP.gather(-1, last_L1) + sums_LP.gather(-1, last_L1) / inside_LP.gather(-1, last_L1).clamp(min=1)
