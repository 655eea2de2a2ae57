"""What the comparison measures, from counts and choices: pure functions, and the recorder that reads choices off a model.

Shapes: L layers, E experts, k experts per token, D domains, W windows of S tokens, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_phibalance import PhiBalancer
from hf_phibalance.maths import dead_experts, gini, max_vio, mutual_information
from hf_phibalance.routers import reading


class _Choices:
    """A `RouterReader` that notes what every router chooses."""

    is_idle = False

    def __init__(self, balancer: PhiBalancer) -> None:
        self.sites, self._balancer = balancer.sites, balancer
        self.chosen: list[Tensor] = []

    @property
    def owner(self) -> nn.Module | None:
        return self._balancer.backbone

    def choice_bias(self, index: int) -> Tensor | None:
        return self._balancer.forwards.choice_bias(index)

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        self.chosen.append(selected.detach())
        return carrier


@contextmanager
def recorded_choices(balancer: PhiBalancer) -> Iterator[list[Tensor]]:
    """While open, every call of a router appends the experts `(T, k)` it chose, bias included, to the list."""
    choices = _Choices(balancer)
    with reading(choices):
        yield choices.chosen


def count_by_window(choices: Sequence[Tensor], windows: int, num_experts: int) -> Tensor:
    """Assignments per window, layer and expert, `(W, L, E)`, from the choices `(W * S, k)` of every layer in turn."""
    counts = []
    for chosen in choices:
        rows = chosen.reshape(windows, -1).cpu()
        counts.append(torch.zeros(windows, num_experts).scatter_add_(1, rows, torch.ones(rows.shape)))
    return torch.stack(counts, 1)


def changed_share(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Share of the (token, layer) top-k assignments in `before` that are not in `after`; the order within k is no matter."""
    kept = total = 0
    for old, new in zip(before, after):
        kept += int((old.unsqueeze(-1) == new.unsqueeze(-2)).any(-1).sum())
        total += old.numel()
    return 1.0 - kept / total


def domain_information(counts_DLE: Tensor) -> Tensor:
    """
    Mutual information of domain and expert in bits, `(L,)`, all domains weighing the same: 0 if every domain uses the
    experts alike, log2 D if no two domains share an expert.
    """
    shares_DLE = counts_DLE.double() / counts_DLE.sum(-1, keepdim=True)
    return mutual_information(shares_DLE.transpose(0, 1))


def batch_max_vio(counts_WLE: Tensor, groups: Sequence[Sequence[int]]) -> float:
    """MaxVio of batches that hold the windows of each of `groups`: mean over layers, then over batches."""
    loads = torch.stack([counts_WLE[list(group)].sum(0) for group in groups])
    return float(max_vio(loads).mean())


def balance_figures(counts_DWLE: Tensor, rows: int) -> dict[str, float]:
    """
    Balance on held-out text, from the assignments of every window.

    Args:
        counts_DWLE (`torch.Tensor` of shape `(D, W, L, E)`): Assignments by domain and window.
        rows (`int`): Windows of a batch, for the figures per batch.

    Returns:
        `dict`: `max_vio_global` (mean over layers), `max_vio_worst_layer`, `gini`, `dead_experts` (over all layers),
        `max_vio_mixed_batch` and `max_vio_domain_batch` (batches of all domains, and of one), `domain_information`.
    """
    domains, windows, _, _ = counts_DWLE.shape
    load_LE = counts_DWLE.sum((0, 1))
    flat = counts_DWLE.flatten(0, 1)
    each = max(1, rows // domains)
    mixed = [
        [d * windows + w for d in range(domains) for w in range(i, i + each)]
        for i in range(0, windows - each + 1, each)
    ]
    single = [
        [d * windows + w for w in range(i, i + rows)]
        for d in range(domains)
        for i in range(0, windows - rows + 1, rows)
    ]
    return {
        "max_vio_global": float(max_vio(load_LE).mean()),
        "max_vio_worst_layer": float(max_vio(load_LE).max()),
        "gini": float(gini(load_LE).mean()),
        "dead_experts": float(dead_experts(load_LE).sum()),
        "max_vio_mixed_batch": batch_max_vio(flat, mixed),
        "max_vio_domain_batch": batch_max_vio(flat, single),
        "domain_information": float(domain_information(counts_DWLE.sum(1)).mean()),
    }


def steps_to_recover(values: Sequence[float], switch: int, within: float = 1.25, smooth: int = 10) -> int:
    """
    Steps after `switch` until a figure is back within `within` times its mean before the switch.

    The figure is smoothed by the mean of the last `smooth` steps, all after the switch (fewer right after it), the mean
    before is that of the second half of the steps before.

    Args:
        values (`Sequence[float]`): The figure of every step.
        switch (`int`): First step of the new mixture.
        within (`float`, *optional*, defaults to `1.25`): Factor that counts as recovered.
        smooth (`int`, *optional*, defaults to `10`): Steps to smooth over.

    Returns:
        `int`: 0 if it never rose that high; all steps after the switch if it does not come back.
    """
    before = values[switch // 2 : switch]
    limit = within * math.fsum(before) / len(before)
    after = values[switch:]
    for step in range(smooth - 1, len(after)):
        if math.fsum(after[step - smooth + 1 : step + 1]) / smooth <= limit:
            return 0 if step == smooth - 1 else step + 1
    return len(after)


def thin(values: Sequence[float], points: int, multiple: int = 1) -> list[float]:
    """
    At most `points` means of consecutive stretches of `values`, equally long (but for the last, which may be shorter).

    Args:
        values (`Sequence[float]`): A figure of every step.
        points (`int`): Most values to return.
        multiple (`int`, *optional*, defaults to `1`): Of which the length of a stretch is one; the domains of a blocked
            stream take turns, so stretches of whole turns hold equally much of each.
    """
    stretch = math.ceil(len(values) / points / multiple) * multiple
    pieces = [values[start : start + stretch] for start in range(0, len(values), max(1, stretch))]
    return [math.fsum(piece) / len(piece) for piece in pieces]
