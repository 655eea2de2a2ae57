"""How a step moves the selection bias, by method. Shapes: L routers of E experts each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maths import quantile_bias


@torch.no_grad()
def bias_step(
    rule: str,
    coef: float,
    bias_LE: Tensor,
    price_LE: Tensor,
    load_LE: Tensor,
    margins_LEH: Tensor,
    top_k_L1: Tensor,
    width_L1: Tensor,
) -> Tensor:
    """
    Returns the change of the biases in a step, `(L, E)`.

    Args:
        rule (`str`):
            `"dual"`: -coef · q (arXiv 2605.15403); `"sign"`: coef · sign(mean load - load) (arXiv 2408.15664, Algorithm 1);
            `"quantile"`: the fraction `coef` of the way to the bias that gives every expert its fair share (Quantile Balancing).
        coef (`float`): step size.
        bias_LE, price_LE, load_LE (`torch.Tensor` of shape `(L, E)`): biases in force, prices, load of the step.
        margins_LEH (`torch.Tensor` of shape `(L, E, H)`): histograms of margins, for `"quantile"`.
        top_k_L1, width_L1 (`torch.Tensor` of shape `(L, 1)`): experts per token, span of the scores.
    """
    if rule == "dual":
        return -coef * price_LE
    if rule == "sign":
        return coef * (load_LE.mean(dim=-1, keepdim=True) - load_LE).sign()  # the sign of NaN is 0
    return coef * (quantile_bias(margins_LEH, top_k_L1, bias_LE, width_L1) - bias_LE)
