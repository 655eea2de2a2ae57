"""
Prices of the current step: for methods that do not use those of the previous step, and for `price_from`.

Unlike the prices of φ-balancing, they depend on the split of a step into micro-batches and ranks. Shapes: L routers of E experts
each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..maths import Potential, centred_price


@torch.no_grad()
def price_now(
    potential: Potential,
    mean_LE: Tensor,
    own_LE: Tensor,
    step_LE: Tensor,
    *,
    price_from: str,
    pooled: bool,
    ema_rate: float,
    top_k: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """
    Returns the prices of a micro-batch, `(L, E)`, once its forward has ended.

    Args:
        potential (`Potential`): φ.
        mean_LE (`torch.Tensor` of shape `(L, E)`): EMA of the previous steps.
        own_LE, step_LE (`torch.Tensor` of shape `(L, E)`): statistic summed over the micro-batch, and over the step so far.
        price_from (`str`): `"current"` mixes the micro-batch into the mean (arXiv 2605.15403, Algorithm 1). `"global"` mixes in
            the step so far, over all ranks.
        pooled (`bool`): whether all layers share the price of their pooled tokens, as in transformers'
            `load_balancing_loss_func`. Its f sums to k instead of 1, and it is a mean over layers instead of a sum.
        ema_rate (`float`): η.
        top_k (`int`): experts per token.
        sum_over_ranks (`Callable`): sums a tensor over the ranks, in place.
    """
    if pooled:
        pooled_E = own_LE.sum(dim=0)
        price_E = centred_price(potential, pooled_E / pooled_E.sum().clamp(min=1e-30))
        return (top_k / len(own_LE) * price_E).expand_as(own_LE)
    sums_LE = sum_over_ranks(step_LE.clone()) if price_from == "global" else own_LE
    share_LE = sums_LE / sums_LE.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return centred_price(potential, torch.lerp(mean_LE, share_LE, ema_rate))
