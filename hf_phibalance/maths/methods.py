"""
Balancing methods: φ-balancing and its baselines, with their prices and updates of the selection bias. To add a method,
add a row to [`METHODS`].

Most baselines need no code of their own. For example, the Switch loss E Σ_e f_e P_e of one micro-batch is ⟨q, p⟩ with
q = E f, and q = ∇φ(E f) + 1 for the potential l2. So it is φ-balancing with potential l2, load as statistic, no
memory, and the price of the current micro-batch.

The bias can be combined with the price gradient. The price gradient is proportional control: it acts at once but
leaves an offset, which is smaller for a larger `coef`. The bias sums the remaining price: integral control, which
removes the offset.

Shapes: L routers, T tokens, E experts, H bins of a histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from .potentials import Potential, centred_price


BINS = 1000  # per margin histogram
ROUNDING = 1e-4  # rounding puts a bias beyond its reach by less than this share; that must not add up

PHI_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "coef": 0.01,
        "bias_coef": 0.0,
        "potential": "neg_entropy",
        "potential_kwargs": {},
        "ema_rate": 0.3,
        "track": "probs",
        "bias_track": "load",
        "price_from": "previous",
    }
)


@dataclass(frozen=True)
class Method:
    """One balancing method."""

    source: str  # where it is published
    values: Mapping[str, Any] = field(default_factory=dict)  # defaults of fields, where they differ from PHI_DEFAULTS
    free: tuple[str, ...] = ()  # fields of PHI_DEFAULTS that a user may set
    bias_rule: Literal["dual", "sign", "quantile"] = "dual"  # how a step moves the selection bias; see `bias_step`
    pooled: bool = False  # whether all layers share the price of their pooled tokens; see `price_now`
    freezes: bool = False  # whether the parameters of the routers are frozen

    def default(self, name: str) -> Any:
        """Returns this method's default of the field `name`."""
        value = self.values.get(name, PHI_DEFAULTS[name])
        return dict(value) if isinstance(value, dict) else value


_SWITCH = {"potential": "l2", "ema_rate": 1.0, "track": "load", "price_from": "current"}
_OFF = {"coef": 0.0}

METHODS: dict[str, Method] = {
    "phi": Method("arXiv 2605.15403, Algorithm 1", free=tuple(PHI_DEFAULTS)),
    # α E Σ_e f_e P_e per layer, f the share of the assignments (arXiv 2101.03961, Eq. 4; 2202.08906 for top-k)
    "switch": Method("arXiv 2101.03961, Eq. 4", _SWITCH, ("coef", "bias_coef")),
    # switch with f pooled over layers and not divided by k, and a mean over layers instead of a sum
    "pooled": Method("transformers, load_balancing_loss_func", _SWITCH | {"coef": 0.001}, ("coef",), pooled=True),
    # switch with f of the global batch so far
    "global_batch": Method("arXiv 2501.11873", _SWITCH | {"price_from": "global"}, ("coef", "bias_coef")),
    "loss_free": Method("arXiv 2408.15664, Algorithm 1", _OFF | {"bias_coef": 0.001}, ("bias_coef",), "sign"),
    "quantile": Method(
        "Quantile Balancing (Su, 2026); Kimi K3 report, Eqs. 13-14",
        _OFF | {"bias_coef": 1.0},
        ("bias_coef",),
        "quantile",
    ),
    "frozen": Method("routers keep their initial or pretrained weights", _OFF, freezes=True),
    "none": Method("no balancing, counting only", _OFF),
}


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
    Returns the prices of a micro-batch, `(L, E)`, at the end of its forward.

    `mean_LE` is the EMA of the previous steps, `own_LE` the statistic summed over the micro-batch, `step_LE` summed
    over the step so far. `price_from="current"` mixes the micro-batch into the mean (arXiv 2605.15403, Algorithm 1),
    `"global"` the step so far over all ranks. With `pooled`, all layers share the price of their pooled tokens, as in
    transformers' `load_balancing_loss_func`. Its f sums to k instead of 1, and it averages layers instead of summing.
    """
    if pooled:
        pooled_E = own_LE.sum(dim=0)
        price_E = centred_price(potential, pooled_E / pooled_E.sum().clamp(min=1e-30))
        return (top_k / len(own_LE) * price_E).expand_as(own_LE)
    sums_LE = sum_over_ranks(step_LE.clone()) if price_from == "global" else own_LE
    share_LE = sums_LE / sums_LE.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return centred_price(potential, torch.lerp(mean_LE, share_LE, ema_rate))


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

    `"dual"`: -coef · q (arXiv 2605.15403). `"sign"`: coef · sign(mean load - load) (arXiv 2408.15664, Algorithm 1).
    `"quantile"`: the fraction `coef` of the way to [`quantile_bias`].
    """
    if rule == "dual":
        return -coef * price_LE
    if rule == "sign":
        return coef * (load_LE.mean(dim=-1, keepdim=True) - load_LE).sign()  # the sign of NaN is 0
    return coef * (quantile_bias(margins_LEH, top_k_L1, bias_LE, width_L1) - bias_LE)


def margin_histogram(scores: Tensor, bias: Tensor, top_k: int, mask: Tensor, width: float) -> Tensor:
    """
    Returns the margin histogram of one router, for [`quantile_bias`]: token weights summed by bin, `(E, H)`.

    A token selects expert e if s_e + b_e exceeds the token's cutoff, its (k+1)-th largest biased score. So the margin,
    cutoff - s_e, is the bias that e needs to be selected. Histograms are sums over tokens, so they do not depend on
    how a step is split. `scores (T, E)` are without the bias, `bias (E,)` is the current one, `mask (T,)` weighs the
    tokens, and `width` is the span of the scores (1 for probabilities).
    """
    experts = scores.shape[-1]
    low, high = (bound.squeeze() for bound in _margin_range(bias.unsqueeze(0), bias.new_full((1, 1), width)))
    cutoff_T1 = (scores + bias).topk(top_k + 1, dim=-1).values[:, -1:]
    place_TE = (cutoff_T1 - scores - low) * (BINS / (high - low))
    place_TE = place_TE.clamp_(max=BINS).long().clamp_(0, BINS - 1)  # a masked expert (score -inf) has margin inf
    place_TE += torch.arange(experts, device=scores.device) * BINS
    weight_TE = mask.unsqueeze(-1).expand_as(place_TE)
    counts = torch.zeros(experts * BINS, device=scores.device)
    return counts.scatter_add_(0, place_TE.reshape(-1), weight_TE.reshape(-1)).view(experts, BINS)


def quantile_bias(histogram_LEH: Tensor, top_k_L1: Tensor, bias_LE: Tensor, width_L1: Tensor) -> Tensor:
    """
    Returns the bias `(L, E)` that would have given every expert its fair share: the k/E quantile of its margins,
    interpolated within the bin and centred (Su 2026, "Quantile Balancing"; Kimi K3 report, Eqs. 13-14).

    Takes the margin histogram of a step, the experts per token, the bias during the step and the span of the scores.
    Without tokens the bias stays.
    """
    low_L1, high_L1 = _margin_range(bias_LE, width_L1)
    below_LEH = histogram_LEH.cumsum(-1)
    total_LE = below_LEH[..., -1]
    target_LE1 = (total_LE * top_k_L1 / bias_LE.shape[-1]).unsqueeze(-1)
    place_LE1 = torch.searchsorted(below_LEH, target_LE1).clamp_(max=BINS - 1)
    inside_LE1 = histogram_LEH.gather(-1, place_LE1)
    before_LE1 = below_LEH.gather(-1, place_LE1) - inside_LE1
    part_LE = ((target_LE1 - before_LE1) / inside_LE1.clamp(min=1e-30)).clamp_(0, 1).squeeze(-1)
    quantile_LE = low_L1 + (place_LE1.squeeze(-1) + part_LE) * (high_L1 - low_L1) / BINS
    centred_LE = quantile_LE - quantile_LE.mean(-1, keepdim=True)
    return torch.where(total_LE > 0, centred_LE, bias_LE)


def _margin_range(bias_LE: Tensor, width_L1: Tensor) -> tuple[Tensor, Tensor]:
    """Returns bounds `(L, 1)` of the margins of scores that span at most `width`."""
    return bias_LE.amin(-1, keepdim=True) - width_L1, bias_LE.amax(-1, keepdim=True) + width_L1


def step_within(bias_LE: Tensor, step_LE: Tensor, reach_LE: Tensor) -> Tensor:
    """
    Returns `bias + step`, projected so that every bias stays within its reach of the router's mean bias, `(L, E)`.

    This prevents wind-up. The bias sums prices. If the load does not respond (an expert is masked, or a frozen router
    sees few tokens), the sum would grow without limit and take as long to shrink again.

    The router keeps the mean of `bias + step`: what some experts cannot take goes to experts with room. A bias that
    was loaded beyond its reach may move back, but no farther out. If nothing is out of reach, the result is exactly
    `bias + step`. A step longer than twice the reach is shortened to that length.
    """
    off_LE = _off_mean(bias_LE).abs()
    limit_LE = torch.where(off_LE > reach_LE * (1 + ROUNDING), off_LE, reach_LE)
    longest_L1 = step_LE.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    moved_LE = bias_LE + step_LE * (2 * limit_LE.amax(dim=-1, keepdim=True) / longest_L1).clamp(max=1.0)
    off_LE = _off_mean(moved_LE)
    beyond_L1 = (off_LE.abs() > limit_LE).any(dim=-1, keepdim=True)
    within_LE = (off_LE - _shift(off_LE, limit_LE)).clamp(-limit_LE, limit_LE)
    return torch.where(beyond_L1, moved_LE - off_LE + within_LE, moved_LE)


def _off_mean(values_LE: Tensor) -> Tensor:
    return values_LE - values_LE.mean(dim=-1, keepdim=True)


def _shift(values_LE: Tensor, limit_LE: Tensor) -> Tensor:
    """
    Returns the λ `(L, 1)` with Σ_e clamp(values_e - λ, ±limit_e) = 0.

    The sum starts at Σ limit and falls with λ. Its slope is the number of experts inside their limits, so it is linear
    between the points at which an expert enters or leaves its limits.
    """
    points_LP, order_LP = torch.cat([values_LE - limit_LE, values_LE + limit_LE], dim=-1).sort(dim=-1)
    entering_LP = torch.cat([torch.ones_like(values_LE), -torch.ones_like(values_LE)], dim=-1).gather(-1, order_LP)
    inside_LP = entering_LP.cumsum(dim=-1)  # after each point
    falls_LP = (inside_LP[:, :-1] * points_LP.diff(dim=-1)).cumsum(dim=-1)
    sums_LP = limit_LE.sum(dim=-1, keepdim=True) - torch.nn.functional.pad(falls_LP, (1, 0))
    last_L1 = (sums_LP >= 0).sum(dim=-1, keepdim=True) - 1
    return points_LP.gather(-1, last_L1) + sums_LP.gather(-1, last_L1) / inside_LP.gather(-1, last_L1).clamp(min=1)
