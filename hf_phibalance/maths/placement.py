"""
Which experts are on which rank under expert parallelism.

Shapes: L layers, E experts, R ranks. An order `(E,)` lists the experts rank by rank: the first E / R are on rank 0, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread_experts(load_E: Tensor, ranks: int) -> Tensor:
    """
    Spreads experts over ranks by their loads, with the same number of experts on each rank.

    The experts, busiest first, go to the rank with the least load that has room (longest processing time first). Then the busiest rank
    swaps single experts with other ranks for as long as that lowers its load. This matters where a rank has few experts.

    Args:
        load_E (`torch.Tensor` of shape `(E,)`): Load of each expert.
        ranks (`int`): Number of ranks, a divisor of E.

    Returns:
        `torch.Tensor` of shape `(E,)`: the experts in the order of ranks. Those of a rank are sorted.
    """
    size = experts_per_rank(load_E.numel(), ranks)
    load = load_E.tolist()
    on: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for expert in sorted(range(len(load)), key=lambda expert: -load[expert]):
        rank = min((rank for rank in range(ranks) if len(on[rank]) < size), key=lambda rank: sums[rank])
        on[rank].append(expert)
        sums[rank] += load[expert]
    while True:
        top = max(range(ranks), key=lambda rank: sums[rank])
        swaps = [
            (max(sums[top] - load[given] + load[taken], sums[rank] + load[given] - load[taken]), rank, given, taken)
            for rank in range(ranks)
            if rank != top
            for given in on[top]
            for taken in on[rank]
        ]
        highest, rank, given, taken = min(swaps, default=(sums[top], 0, 0, 0))
        if highest >= sums[top] * (1 - 1e-9):
            return torch.tensor([sorted(experts) for experts in on], device=load_E.device).flatten()
        on[top][on[top].index(given)], on[rank][on[rank].index(taken)] = taken, given
        sums[top], sums[rank] = (sum(load[expert] for expert in on[index]) for index in (top, rank))


def busiest_rank(load_LE: Tensor, ranks: int) -> Tensor:
    """Load of the busiest rank over the mean, shape `(L,)`, for experts in the order of ranks: 1 at balance, R at most."""
    rank_LR = load_LE.reshape(*load_LE.shape[:-1], ranks, experts_per_rank(load_LE.shape[-1], ranks)).sum(-1)
    return rank_LR.amax(-1) / rank_LR.mean(-1)


def least_busiest_rank(load_LE: Tensor, ranks: int) -> Tensor:
    """
    A bound below [`busiest_rank`] in any order, shape `(L,)`: the rank of the busiest expert has at least the E / R - 1 least busy
    experts besides.
    """
    size = experts_per_rank(load_LE.shape[-1], ranks)
    sorted_LE = load_LE.sort(-1).values
    least_L = sorted_LE[..., -1] + sorted_LE[..., : size - 1].sum(-1)
    return (least_L * ranks / load_LE.sum(-1)).clamp(min=1.0)


def experts_per_rank(experts: int, ranks: int) -> int:
    """Returns E / R. Raises `ValueError` if that is no whole number."""
    if ranks < 1 or experts % ranks:
        raise ValueError(f"`ranks` is {ranks}, but a layer has {experts} experts: choose a divisor of {experts}.")
    return experts // ranks
