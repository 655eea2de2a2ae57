"""
Metrics of expert load: how evenly it is spread, and how much the chosen expert tells about the domain of a token.

Load metrics take the load of each expert, `load_LE` (L layers, E experts), as counts or shares, with any leading
dimensions. They return one number per layer. They are functions of the relative load r = E · load / Σ load, which is 1
for every expert at balance. A layer without tokens counts as balanced, never as `nan`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


DEAD_THRESHOLD = 0.05


def relative_load(load_LE: Tensor) -> Tensor:
    """Returns `E * load / sum(load)` in fp32 (fp64 if the input is), shape `(L, E)`; ones if there is no load."""
    load_LE = load_LE.to(torch.promote_types(load_LE.dtype, torch.float32))
    mean_L1 = load_LE.mean(-1, keepdim=True)
    routed_L1 = mean_L1 > 0
    return torch.where(routed_L1, load_LE / torch.where(routed_L1, mean_L1, 1.0), 1.0)


def max_relative_load(load_LE: Tensor) -> Tensor:
    """Load of the busiest expert over the mean load, shape `(L,)`: 1 at balance, `E` if one expert gets all."""
    return relative_load(load_LE).amax(-1)


def min_relative_load(load_LE: Tensor) -> Tensor:
    """Load of the least busy expert over the mean load, shape `(L,)`: 1 at balance, 0 if an expert gets nothing."""
    return relative_load(load_LE).amin(-1)


def max_vio(load_LE: Tensor) -> Tensor:
    """Maximal violation, `(max_e load_e - mean) / mean` (arXiv 2408.15664, Eq. 4), shape `(L,)`: 0 at balance."""
    return max_relative_load(load_LE) - 1.0


def gini(load_LE: Tensor) -> Tensor:
    """
    Gini coefficient, shape `(L,)`: 0 at balance, `(E - 1) / E` if one expert gets all.

    `sum_i (2 i - E - 1) x_(i) / (E sum(x))` with loads `x_(1) <= ... <= x_(E)`. This is half the mean absolute
    difference of all pairs, over the mean.
    """
    r_LE = relative_load(load_LE).sort(-1).values
    num_experts = r_LE.shape[-1]
    rank_E = torch.arange(1, num_experts + 1, dtype=r_LE.dtype, device=r_LE.device)
    return ((2.0 * rank_E - num_experts - 1.0) * r_LE).sum(-1) / num_experts**2


def cv(load_LE: Tensor) -> Tensor:
    """Coefficient of variation, population standard deviation over mean, shape `(L,)`: 0 at balance."""
    return (relative_load(load_LE) - 1.0).square().mean(-1).sqrt()


def normalised_entropy(load_LE: Tensor) -> Tensor:
    """Entropy of the shares over `log E`, shape `(L,)`: 1 at balance and for E = 1, 0 if one expert gets all."""
    r_LE = relative_load(load_LE)
    num_experts = r_LE.shape[-1]
    if num_experts == 1:
        return torch.ones_like(r_LE[..., 0])
    return torch.special.entr(r_LE / num_experts).sum(-1) / math.log(num_experts)


def dead_experts(load_LE: Tensor) -> Tensor:
    """
    Number of experts with less than 5% of the fair share of the load, shape `(L,)`, in floating point.

    Such an expert trains on less than a twentieth of the tokens of an average one, for any number of experts.
    """
    r_LE = relative_load(load_LE)
    return (r_LE < DEAD_THRESHOLD).sum(-1).to(r_LE.dtype)


def noise_floor(num_experts: int, top_k: int, tokens: float | Tensor) -> Tensor:
    """
    Returns the MaxVio that chance alone gives if every token picks `top_k` experts uniformly. Below it is only noise.

    `sqrt((E - k) / (T k)) * sqrt(2 log E)`: the count of an expert is then binomial with relative standard deviation
    `sqrt((E - k) / (T k))`. The largest of `E` nearly Gaussian counts is on average at most `sqrt(2 log E)` deviations
    above the mean (30% fewer for 8 experts, 15% for 256). Real tokens are correlated, so real noise is larger.

    Args:
        num_experts (`int`): Number of experts `E`.
        top_k (`int`): Experts per token `k`.
        tokens (`float` or `torch.Tensor` of shape `(L,)`): Tokens `T` summed into the load. 0 gives `inf`.

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


def summarise(load_LE: Tensor) -> dict[str, Tensor]:
    """Returns all metrics of a load by name, one `(L,)` tensor each."""
    metrics = (max_vio, gini, cv, normalised_entropy, min_relative_load, max_relative_load, dead_experts)
    return {metric.__name__: metric(load_LE) for metric in metrics}


def mutual_information(counts_DE: Tensor) -> Tensor:
    """
    Plug-in estimate of I(domain; expert) in bits: how much an assignment's expert tells about its token's domain.

    It is 0 if all domains use the experts alike. Its maximum is the smaller of the entropies of domain and expert.

    Args:
        counts_DE (`torch.Tensor` of shape `(..., D, E)`):
            How often each expert was chosen in each domain. Pass shares per domain to weigh all domains equally.

    Returns:
        `torch.Tensor` of shape `(...)`, in fp64; 0 if nothing was counted.
    """
    counts_DE = counts_DE.double()
    joint_DE = counts_DE / counts_DE.sum((-2, -1), keepdim=True).clamp(min=1e-300)

    def entropy(p: Tensor, *dims: int) -> Tensor:
        return torch.special.entr(p).sum(dims) / math.log(2)

    domain_D, expert_E = joint_DE.sum(-1), joint_DE.sum(-2)
    return (entropy(expert_E, -1) + entropy(domain_D, -1) - entropy(joint_DE, -2, -1)).clamp(min=0.0)


def mutual_information_bias(counts_DE: Tensor, top_k: int) -> float:
    """
    Expectation of [`mutual_information`] in bits if the domains do not differ: `(D - 1) (E - k) / (2 T k ln 2)`.

    For `k = 1` this is the correction of Miller and Madow. The `k` experts of a token are distinct, so they are not
    independent. To second order the estimate is `Σ_de (O_de - T_d π_e)² / (T_d π_e) / (2 T k ln 2)`, where π_e is the
    probability that a token selects expert e. Each square is on average `T_d π_e (1 - π_e)`, less its share `T_d / T`
    because π_e is fitted. `Σ_e (1 - π_e) = E - k` for every π. D and E count only domains and experts that occur.
    Tokens of real texts are not independent, so the real expectation is larger.

    Args:
        counts_DE (`torch.Tensor` of shape `(D, E)`): How often each expert was chosen in each domain.
        top_k (`int`): Experts per token.
    """
    assignments = int(counts_DE.sum())
    domains, experts = (int((counts_DE.sum(axis) > 0).sum()) for axis in (1, 0))
    return max(domains - 1, 0) * max(experts - top_k, 0) / (2 * max(assignments, 1) * math.log(2))
