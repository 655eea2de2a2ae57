"""
What the comparisons measure, from expert choices and counts.

Shapes: L layers, E experts, k experts per token, D domains, W windows of S tokens, T tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_phibalance import PhiBalancer
from hf_phibalance.maths import dead_experts, gini, max_vio, mutual_information
from hf_phibalance.routers import reading


CURVE_POINTS = 50
SMOOTH = 5  # training steps of a mean, in fine-tuning of a real model


class _Choices:
    """A `RouterReader` that records the choices of every router."""

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
    """Context manager: every router call appends the experts `(T, k)` it chose, bias included, to the yielded list."""
    choices = _Choices(balancer)
    with reading(choices):
        yield choices.chosen


def mean_max_vio(loads: Sequence[Tensor] | Tensor) -> float:
    """Returns the mean over layers of the MaxVio of their loads `(E,)`."""
    return float(max_vio(torch.stack(list(loads)).float()).mean())


def count_by_window(choices: Sequence[Tensor], windows: int, num_experts: int) -> Tensor:
    """Counts assignments per window, layer and expert, `(W, L, E)`, from each layer's choices `(W * S, k)`."""
    counts = []
    for chosen in choices:
        rows = chosen.reshape(windows, -1).cpu()
        counts.append(torch.zeros(windows, num_experts).scatter_add_(1, rows, torch.ones(rows.shape)))
    return torch.stack(counts, 1)


def changed_share(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Returns the share of (token, layer) top-k assignments in `before` that are not in `after`. Order is ignored."""
    kept = total = 0
    for old, new in zip(before, after):
        kept += int((old.unsqueeze(-1) == new.unsqueeze(-2)).any(-1).sum())
        total += old.numel()
    return 1.0 - kept / total


def domain_information(counts_DLE: Tensor) -> Tensor:
    """
    Returns the mutual information of domain and expert in bits, `(L,)`, with equal weight for each domain: 0 if all
    domains use the experts alike, log2 D if no two domains share an expert.
    """
    shares_DLE = counts_DLE.double() / counts_DLE.sum(-1, keepdim=True)
    return mutual_information(shares_DLE.transpose(0, 1))


def balance_figures(counts_DWLE: Tensor, rows: int) -> dict[str, float]:
    """
    Returns balance on held-out text, from the assignments of each window. Figures are means over layers; dead experts
    are summed. A batch has `rows` windows, of all domains (`max_vio_mixed_batch`) or of one (`max_vio_domain_batch`).
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

    def of_batches(groups: list[list[int]]) -> float:
        return float(max_vio(torch.stack([flat[group].sum(0) for group in groups])).mean())

    return {
        "max_vio_global": float(max_vio(load_LE).mean()),
        "max_vio_worst_layer": float(max_vio(load_LE).max()),
        "gini": float(gini(load_LE).mean()),
        "dead_experts": float(dead_experts(load_LE).sum()),
        "max_vio_mixed_batch": of_batches(mixed),
        "max_vio_domain_batch": of_batches(single),
        "domain_information": float(domain_information(counts_DWLE.sum(1)).mean()),
    }


@torch.no_grad()
def examine_text(
    model: nn.Module, balancer: PhiBalancer, validation: Mapping[str, Tensor], rows: int, batch: int = 16
) -> tuple[dict[str, float], list]:
    """
    Measures loss and balance on held-out windows `(W, S)` of each domain. Returns the figures, and the experts' shares of the assignments
    as lists `(L, D, E)`.
    """
    model.eval()
    losses, counts = {}, []
    num_experts = balancer.sites[0].num_experts
    for domain, windows in validation.items():
        sums, by_window = [], []
        for ids in windows.to(model.device).split(batch):
            with recorded_choices(balancer) as chosen:
                loss = model(input_ids=ids, labels=ids).loss
            sums.append(float(loss) * len(ids))
            by_window.append(count_by_window(chosen, len(ids), num_experts))
        losses[domain] = math.fsum(sums) / len(windows)
        counts.append(torch.cat(by_window))
    model.train()
    counts_DWLE = torch.stack(counts)
    figures = {"loss": statistics.fmean(losses.values()), **{f"loss_{name}": loss for name, loss in losses.items()}}
    figures |= balance_figures(counts_DWLE, rows)
    by_domain_DLE = counts_DWLE.sum(1)
    shares_LDE = (by_domain_DLE / by_domain_DLE.sum(-1, keepdim=True)).transpose(0, 1)
    return figures, [[rounded(shares) for shares in layer] for layer in shares_LDE.tolist()]


def steps_to_recover(values: Sequence[float], switch: int, within: float = 1.25, smooth: int = 10) -> int:
    """
    Counts the steps after `switch` until the mean of `smooth` steps is at most `within` times the level before (the
    mean over the second half of the steps before `switch`). 0 if it is never above; all steps after `switch` if it
    stays above.
    """
    before = values[switch // 2 : switch]
    limit = within * math.fsum(before) / len(before)
    after = values[switch:]
    for step in range(smooth - 1, len(after)):
        if math.fsum(after[step - smooth + 1 : step + 1]) / smooth <= limit:
            return 0 if step == smooth - 1 else step + 1
    return len(after)


def thin(values: Sequence[float], multiple: int = 1, points: int = CURVE_POINTS) -> list[float]:
    """
    Averages `values` over at most `points` consecutive stretches of equal length, rounded to 5 digits. The length is a
    multiple of `multiple` (the number of domains), so that stretches of a blocked stream have all domains equally.
    """
    stretch = math.ceil(len(values) / points / multiple) * multiple
    pieces = [values[start : start + stretch] for start in range(0, len(values), max(1, stretch))]
    return rounded([math.fsum(piece) / len(piece) for piece in pieces])


def rounded(values: Sequence[float], digits: int = 5) -> list[float]:
    return [round(value, digits) for value in values]
