"""The balancing methods: φ-balancing, and those it is compared with, as points of one space.

A method is what it fixes of the fields of [`PhiBalanceConfig`], which of them it leaves to the user, and how it moves
the selection bias. Most baselines need no code of their own. The Switch loss E Σ_e f_e P_e of one micro-batch, for
example is ⟨q, p⟩ with q = E f, and q = ∇φ(E f) + 1 for the potential l2: it is φ-balancing with that potential on
the hard load, without memory, priced by the micro-batch at hand.

That price may be joined by the dual bias, as φ's own may. The two do different things: a gradient with the price of the
batch at hand is proportional control of *this* batch, it acts at once but leaves an offset, the smaller the larger `coef`;
the bias sums up the price that is left, so it is integral control, which takes the offset of the population away.
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
        values (`Mapping[str, Any]`): Its values of fields of [`PhiBalanceConfig`], where they are not those of φ.
        free (`frozenset[str]`): The fields among them that a user may set to something else.
        bias_rule (`str`, *optional*, defaults to `"dual"`):
            How a step moves the selection bias b of the experts: `"dual"`, b -= bias_coef · q with φ prices; `"sign"`,
            b += bias_coef · sign(mean count - count); `"quantile"`, b moves by the fraction bias_coef to the bias with
            which every expert would have had its fair share of the step.
        pooled (`bool`, *optional*, defaults to `False`):
            Whether all layers share one price, that of their pooled tokens, as in the loss of transformers.
        freezes (`bool`, *optional*, defaults to `False`): Whether the parameters of the routers are frozen.
    """

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    bias_rule: BiasRule = "dual"
    pooled: bool = False
    freezes: bool = False

    def default(self, name: str) -> Any:
        """Its value of the field `name` unless the user says otherwise."""
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
