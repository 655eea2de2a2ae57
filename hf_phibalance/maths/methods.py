"""
The balancing methods: φ-balancing, and the methods it is compared with. To add a method, add a row to [`METHODS`].

Most baselines need no code of their own. For example, the Switch loss E Σ_e f_e P_e of one micro-batch is ⟨q, p⟩ with q = E f, and
q = ∇φ(E f) + 1 for the potential l2. So it is φ-balancing with potential l2, load as statistic, no memory, and the price of the
current micro-batch.

The bias can be used together with the price gradient. The price gradient of the current batch is proportional control: it acts
at once but leaves an offset, which is smaller for a larger `coef`. The bias sums up the remaining price: this integral control
removes the offset.

Shapes: L routers, E experts, H bins of a histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from .bias import quantile_bias
from .potentials import Potential, centred_price


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
        """Returns its default of the field `name`."""
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

    `mean_LE` is the EMA of the previous steps, `own_LE` the statistic summed over the micro-batch, `step_LE` summed over the step so
    far. `price_from="current"` mixes the micro-batch into the mean (arXiv 2605.15403, Algorithm 1), `"global"` the step so far
    over all ranks. With `pooled`, all layers share the price of their pooled tokens, as in transformers'
    `load_balancing_loss_func`, whose f sums to k instead of 1 and which is a mean over layers instead of a sum.
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

    `"dual"`: -coef · q (arXiv 2605.15403). `"sign"`: coef · sign(mean load - load) (arXiv 2408.15664, Algorithm 1). `"quantile"`:
    the fraction `coef` of the way to the bias that gives every expert its fair share; see [`quantile_bias`].
    """
    if rule == "dual":
        return -coef * price_LE
    if rule == "sign":
        return coef * (load_LE.mean(dim=-1, keepdim=True) - load_LE).sign()  # the sign of NaN is 0
    return coef * (quantile_bias(margins_LEH, top_k_L1, bias_LE, width_L1) - bias_LE)
