"""
Simulates experts with limited capacity. Assignments over the capacity are dropped: for that expert, the token gets nothing but what the
residual connection carries.

Shapes: T tokens, k experts per token, E experts, L layers, W windows of text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_phibalance import PhiBalancer
from hf_phibalance.routers import find_routers

from .measures import count_by_window, recorded_choices


def within_capacity(chosen_Tk: Tensor, weights_Tk: Tensor, num_experts: int, factor: float) -> Tensor:
    """
    Returns which assignments fit, `(T, k)`: an expert takes `factor` times the mean load, rounded up, those with the highest weight
    first. This is Megatron-Core's default order (`moe_token_drop_policy="probs"`).
    """
    capacity = math.ceil(factor * chosen_Tk.numel() / num_experts)
    chosen, by_weight = chosen_Tk.reshape(-1), weights_Tk.reshape(-1).argsort(descending=True, stable=True)
    order = by_weight[chosen[by_weight].argsort(stable=True)]  # expert by expert, highest weight first
    loads_E = torch.bincount(chosen, minlength=num_experts)
    starts = (loads_E.cumsum(0) - loads_E)[chosen[order]]
    fits = torch.empty_like(chosen, dtype=torch.bool)
    fits[order] = torch.arange(len(order), device=order.device) - starts < capacity
    return fits.view_as(chosen_Tk)


@contextmanager
def limited(model: nn.Module, factor: float) -> Iterator[list[int]]:
    """
    Context manager: inside it, experts have the capacity `factor`, and 0 is no limit. A dropped assignment has weight 0, so it gives the
    router no gradient of the task. Weights that are kept stay as they are. Yields the numbers of all and of the dropped assignments.
    """
    counted = [0, 0]
    handles = []

    def limit(num_experts: int, args: tuple) -> tuple:
        hidden, chosen_Tk, weights_Tk = args
        fits_Tk = within_capacity(chosen_Tk, weights_Tk.detach(), num_experts, factor)
        counted[0] += fits_Tk.numel()
        counted[1] += int((~fits_Tk).sum())
        return hidden, chosen_Tk, weights_Tk * fits_Tk

    for site in find_routers(model) if factor else []:
        experts: Any = site.parent.experts
        handles.append(experts.register_forward_pre_hook(lambda _, args, size=site.num_experts: limit(size, args)))
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def examine_capacity(
    model: nn.Module, balancer: PhiBalancer, validation: Mapping[str, Tensor], rows: int, factors: Sequence[float]
) -> tuple[dict[str, float], list]:
    """
    Measures the loss on held-out windows `(W, S)` of all domains at each capacity, in batches of `rows` windows that mix the domains.
    Returns `loss_at_<factor>` and `dropped_at_<factor>` (share of the assignments), and the loads without a limit in the two halves of
    the windows as lists `(L, 2, E)`.
    """
    model.eval()
    batches = torch.stack(list(validation.values()), 1).flatten(0, 1).to(model.device).split(rows)
    count = sum(map(len, batches))
    figures = {}
    for factor in factors:
        with limited(model, factor) as counted:
            losses = [float(model(input_ids=ids, labels=ids).loss) * len(ids) for ids in batches]
        figures[f"loss_at_{factor:g}"] = math.fsum(losses) / count
        figures[f"dropped_at_{factor:g}"] = counted[1] / max(counted[0], 1)
    by_window = []
    for ids in batches:
        with recorded_choices(balancer) as chosen:
            model.base_model(input_ids=ids)
        by_window.append(count_by_window(chosen, len(ids), balancer.sites[0].num_experts))
    model.train()
    counts_WLE = torch.cat(by_window).long()
    halves_LHE = torch.stack([counts_WLE[::2].sum(0), counts_WLE[1::2].sum(0)], 1)
    return figures, halves_LHE.tolist()
