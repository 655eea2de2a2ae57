"""
The balancing methods: φ-balancing, and those it is compared with.

A method sets some fields of [`PhiBalanceConfig`], leaves others to the user, and moves the selection bias by a rule. Most
baselines need no code of their own. For example, the Switch loss E Σ_e f_e P_e of one micro-batch is ⟨q, p⟩ with q = E f, and
q = ∇φ(E f) + 1 for the potential l2. So it is φ-balancing with potential l2, load as statistic, no memory, and the price of the
current micro-batch.

The bias can be used together with the price gradient. The price gradient of the current batch is proportional control: it acts
at once but leaves an offset, which is smaller for a larger `coef`. The bias sums up the remaining price: this integral control
removes the offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal


BiasRule = Literal["dual", "sign", "quantile"]

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
    """
    One balancing method.

    Args:
        source (`str`): Where it is published.
        values (`Mapping[str, Any]`): Its values of the fields of [`PhiBalanceConfig`] that differ from those of φ.
        free (`frozenset[str]`): The fields that a user may set.
        bias_rule (`str`, *optional*, defaults to `"dual"`):
            How a step moves the selection bias b of the experts: `"dual"`, b -= bias_coef · q with φ prices; `"sign"`,
            b += bias_coef · sign(mean load - load); `"quantile"`, b moves by the fraction bias_coef to the bias that gives
            every expert its fair share of the step.
        pooled (`bool`, *optional*, defaults to `False`):
            Whether all layers share the price of their pooled tokens, as in the loss of transformers.
        freezes (`bool`, *optional*, defaults to `False`): Whether the parameters of the routers are frozen.
    """

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    bias_rule: BiasRule = "dual"
    pooled: bool = False
    freezes: bool = False

    def default(self, name: str) -> Any:
        """Returns its default of the field `name`."""
        value = self.values.get(name, PHI_DEFAULTS[name])
        return dict(value) if isinstance(value, dict) else value


_SWITCH = {"potential": "l2", "ema_rate": 1.0, "track": "load", "price_from": "current"}
_OFF = {"coef": 0.0}

METHODS: dict[str, Method] = {
    "phi": Method("arXiv 2605.15403, Algorithm 1", free=frozenset(PHI_DEFAULTS)),
    # α E Σ_e f_e P_e per layer, f the share of the assignments (arXiv 2101.03961, Eq. 4; 2202.08906 for top-k)
    "switch": Method("arXiv 2101.03961, Eq. 4", _SWITCH, frozenset({"coef", "bias_coef"})),
    # the same with f pooled over layers and not divided by k, and a mean over layers instead of a sum
    "pooled": Method(
        "transformers, load_balancing_loss_func", _SWITCH | {"coef": 0.001}, frozenset({"coef"}), pooled=True
    ),
    # the same as switch with f of the global batch so far
    "global_batch": Method("arXiv 2501.11873", _SWITCH | {"price_from": "global"}, frozenset({"coef", "bias_coef"})),
    "loss_free": Method(
        "arXiv 2408.15664, Algorithm 1", _OFF | {"bias_coef": 0.001}, frozenset({"bias_coef"}), bias_rule="sign"
    ),
    "quantile": Method(
        "Quantile Balancing (Su, 2026); Kimi K3 report, Eqs. 13-14",
        _OFF | {"bias_coef": 1.0},
        frozenset({"bias_coef"}),
        bias_rule="quantile",
    ),
    "frozen": Method("routers keep their initial or pretrained weights", _OFF, freezes=True),
    "none": Method("no balancing, counting only", _OFF),
}
