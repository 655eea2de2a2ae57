"""
The maths: pure functions of tensors, without models, steps or trainers.

| module | what it holds |
|---|---|
| `potentials` | the strictly convex potentials φ and their prices ∇φ |
| `methods` | the balancing methods: their fields of the config, their prices and bias steps |
| `pricing` | routing probabilities of logits, the gradient of ⟨q, p⟩ |
| `windup` | a step of a bias, only as far as the scores can answer it |
| `quantile` | the bias of quantile balancing, from histograms of margins |
| `folding` | a selection bias as a part of the router's weight |
| `metrics` | MaxVio, Gini and the other figures of a load |
| `information` | what an expert tells about the domain of its token |
"""

from .folding import (
    FoldedShift,
    ShiftMoments,
    fold_shift,
    logit_shift,
    price_of_load,
    score_slope,
    selection_threshold,
)
from .information import mutual_information, mutual_information_bias
from .methods import METHODS, PHI_DEFAULTS, Method, bias_step, price_now
from .metrics import (
    DEAD_THRESHOLD,
    dead_experts,
    gini,
    max_relative_load,
    max_vio,
    noise_floor,
    normalised_entropy,
    relative_load,
    summarise,
)
from .potentials import POTENTIALS, Potential, centred_price, get_potential
from .pricing import SCORINGS, price_gradient, routing_probs, sequence_price
from .quantile import BINS, margin_histogram, quantile_bias
from .windup import step_within


__all__ = [
    "BINS",
    "DEAD_THRESHOLD",
    "METHODS",
    "PHI_DEFAULTS",
    "POTENTIALS",
    "SCORINGS",
    "FoldedShift",
    "Method",
    "Potential",
    "ShiftMoments",
    "bias_step",
    "centred_price",
    "dead_experts",
    "fold_shift",
    "get_potential",
    "gini",
    "logit_shift",
    "margin_histogram",
    "max_relative_load",
    "max_vio",
    "mutual_information",
    "mutual_information_bias",
    "noise_floor",
    "normalised_entropy",
    "price_gradient",
    "price_now",
    "price_of_load",
    "quantile_bias",
    "relative_load",
    "routing_probs",
    "score_slope",
    "selection_threshold",
    "sequence_price",
    "step_within",
    "summarise",
]
