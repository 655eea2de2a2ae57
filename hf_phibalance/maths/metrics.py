"""Load-balance metrics: how evenly the tokens of a layer are spread over its experts.

All functions take the load per layer and expert, `load_LE` (L layers, E experts), as counts or shares, and return one
figure per layer; more leading dimensions are welcome. Whether a figure is *global* or *per batch* depends only on what
was summed into the load. All are functions of the relative load r = E · load / Σ load, which is 1 for every expert at
balance. A layer to which nothing was routed shows no imbalance: it counts as balanced, never as `nan`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


DEAD_THRESHOLD = 0.05


def relative_load(load_LE: Tensor) -> Tensor:
    """`E * load / sum(load)` in fp32 (fp64 where the input is), shape `(L, E)`; ones where nothing was routed."""
    load_LE = load_LE.to(torch.promote_types(load_LE.dtype, torch.float32))
    mean_L1 = load_LE.mean(-1, keepdim=True)
    routed_L1 = mean_L1 > 0
    return torch.where(routed_L1, load_LE / torch.where(routed_L1, mean_L1, 1.0), 1.0)


def max_relative_load(load_LE: Tensor) -> Tensor:
    """Load of the busiest expert over the mean load, shape `(L,)`: from 1 at balance to `E` for one expert only."""
    return relative_load(load_LE).amax(-1)


def min_relative_load(load_LE: Tensor) -> Tensor:
    """Load of the idlest expert over the mean load, shape `(L,)`: 1 at balance, 0 if an expert gets nothing."""
    return relative_load(load_LE).amin(-1)


def max_vio(load_LE: Tensor) -> Tensor:
    """Maximal violation, `(max_e load_e - mean) / mean` (arXiv 2408.15664, Eq. 4), shape `(L,)`: 0 at balance."""
    return max_relative_load(load_LE) - 1.0


def gini(load_LE: Tensor) -> Tensor:
    """
    Gini coefficient, shape `(L,)`: 0 at balance, `(E - 1) / E` for one expert only.

    `sum_i (2 i - E - 1) x_(i) / (E sum(x))` with the loads `x_(1) <= ... <= x_(E)` ascending; equal to half the mean
    absolute difference of all pairs over the mean.
    """
    r_LE = relative_load(load_LE).sort(-1).values
    num_experts = r_LE.shape[-1]
    rank_E = torch.arange(1, num_experts + 1, dtype=r_LE.dtype, device=r_LE.device)
    return ((2.0 * rank_E - num_experts - 1.0) * r_LE).sum(-1) / num_experts**2


def cv(load_LE: Tensor) -> Tensor:
    """Coefficient of variation, population standard deviation (divided by `E`) over mean, shape `(L,)`."""
    return (relative_load(load_LE) - 1.0).square().mean(-1).sqrt()


def normalised_entropy(load_LE: Tensor) -> Tensor:
    """Entropy of the shares over `log E`, shape `(L,)`: 1 at balance and for E = 1, 0 for one expert only."""
    r_LE = relative_load(load_LE)
    num_experts = r_LE.shape[-1]
    if num_experts == 1:
        return torch.ones_like(r_LE[..., 0])
    return torch.special.entr(r_LE / num_experts).sum(-1) / math.log(num_experts)


def dead_experts(load_LE: Tensor, threshold: float = DEAD_THRESHOLD) -> Tensor:
    """
    Number of experts with a relative load under `threshold`, shape `(L,)`, in floating point.

    Args:
        load_LE (`torch.Tensor` of shape `(L, E)`): Load as counts or shares.
        threshold (`float`, *optional*, defaults to `0.05`):
            Fraction of the fair share `1 / E`, so that the verdict does not depend on the number of experts. At 5% an
            expert is trained on a twentieth of the tokens of an average one.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"`threshold` is {threshold!r}: choose a fraction of the fair share in (0, 1].")
    r_LE = relative_load(load_LE)
    return (r_LE < threshold).sum(-1).to(r_LE.dtype)


def noise_floor(num_experts: int, top_k: int, tokens: float | Tensor) -> Tensor:
    """
    MaxVio to expect from chance alone if every token picks `top_k` experts uniformly: below it a figure means nothing.

    `sqrt((E - k) / (T k)) * sqrt(2 log E)`: an expert's count is then binomial, of relative standard deviation
    `sqrt((E - k) / (T k))`, and the largest of `E` nearly Gaussian counts averages at most `sqrt(2 log E)` deviations
    (30% fewer for 8 experts, 15% for 256). Real tokens are correlated, so real noise is larger.

    Args:
        num_experts (`int`): Number of experts `E`.
        top_k (`int`): Experts per token `k`.
        tokens (`float` or `torch.Tensor` of shape `(L,)`): Tokens `T` summed into the load; none gives `inf`.

    Returns:
        `torch.Tensor` of the shape of `tokens`.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"`top_k` is {top_k!r}: choose a whole number from 1 to `num_experts` = {num_experts}.")
    tokens = torch.as_tensor(tokens)
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    if top_k == num_experts:
        return torch.zeros_like(tokens)
    return (2.0 * math.log(num_experts) * (num_experts - top_k) / (top_k * tokens)).sqrt()


def summarise(load_LE: Tensor, top_k: int | None = None, dead_threshold: float = DEAD_THRESHOLD) -> dict[str, Tensor]:
    """
    All metrics of a load, one `(L,)` tensor each.

    Args:
        load_LE (`torch.Tensor` of shape `(L, E)`): Load as counts or shares.
        top_k (`int`, *optional*):
            Experts per token. If given, the load must be counts; the result then has the `noise_floor` as well.
        dead_threshold (`float`, *optional*, defaults to `0.05`): See [`dead_experts`].
    """
    summary = {
        "max_vio": max_vio(load_LE),
        "gini": gini(load_LE),
        "cv": cv(load_LE),
        "normalised_entropy": normalised_entropy(load_LE),
        "min_relative_load": min_relative_load(load_LE),
        "max_relative_load": max_relative_load(load_LE),
        "dead_experts": dead_experts(load_LE, dead_threshold),
    }
    if top_k is not None:
        summary["noise_floor"] = noise_floor(load_LE.shape[-1], top_k, load_LE.sum(-1) / top_k)
    return summary
