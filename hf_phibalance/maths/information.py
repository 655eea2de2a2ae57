"""What the choice of an expert tells about the domain of its token, from counts.

Shapes: D domains, E experts, T tokens, k experts per token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mutual_information(counts_DE: Tensor) -> Tensor:
    """
    Plug-in estimate of I(domain; expert) in bits: what the expert of an assignment tells about the domain of its token.
    From 0, every domain uses the experts alike, to the smaller of the entropies of domain and expert.

    Args:
        counts_DE (`torch.Tensor` of shape `(..., D, E)`):
            How often each expert was chosen in each domain. Its shares in each domain let all domains weigh the same.

    Returns:
        `torch.Tensor` of shape `(...)`, in fp64; 0 where nothing was counted.
    """
    counts_DE = counts_DE.double()
    joint_DE = counts_DE / counts_DE.sum((-2, -1), keepdim=True).clamp(min=1e-300)

    def entropy(p: Tensor, *dims: int) -> Tensor:
        return torch.special.entr(p).sum(dims) / math.log(2)

    domain_D, expert_E = joint_DE.sum(-1), joint_DE.sum(-2)
    return (entropy(expert_E, -1) + entropy(domain_D, -1) - entropy(joint_DE, -2, -1)).clamp(min=0.0)


def mutual_information_bias(counts_DE: Tensor, top_k: int) -> float:
    """
    What [`mutual_information`] comes to, in bits, if the domains do not differ at all: `(D - 1) (E - k) / (2 T k ln 2)`.

    For `k = 1` this is the correction of Miller and Madow. A token's `k` experts are distinct, and so not independent:
    to second order the estimate is `Σ_de (O_de - T_d π_e)² / (T_d π_e) / (2 T k ln 2)`, π_e being the probability that
    a token has expert e among its k; each square is `T_d π_e (1 - π_e)` on average, less its share `T_d / T` as
    π_e is fitted, and `Σ_e (1 - π_e) = E - k` whatever π is. Only experts and domains that occur count. Tokens are taken as
    independent; those of real texts are not, so more is to be expected there.

    Args:
        counts_DE (`torch.Tensor` of shape `(D, E)`): How often each expert was chosen in each domain.
        top_k (`int`): Experts per token.
    """
    assignments = int(counts_DE.sum())
    domains, experts = (int((counts_DE.sum(axis) > 0).sum()) for axis in (1, 0))
    return max(domains - 1, 0) * max(experts - top_k, 0) / (2 * max(assignments, 1) * math.log(2))
