"""
The maths: pure functions of tensors, without models, steps or trainers.

| module | contents |
|---|---|
| `potentials` | the convex potentials φ and their prices ∇φ |
| `methods` | the balancing methods: their config fields, prices and updates of the selection bias |
| `pricing` | routing probabilities from logits, the gradient of ⟨q, p⟩ |
| `folding` | folds a selection bias into the router's weight |
| `metrics` | MaxVio, Gini and the other metrics of expert load |
| `placement` | spreads experts over the ranks of expert parallelism; load of the busiest rank |
"""
# ruff: noqa: F401

from .folding import FoldedShift, ShiftMoments, fold_shift, logit_shift, score_slope, selection_threshold
from .methods import (
    BINS,
    METHODS,
    PHI_DEFAULTS,
    Method,
    bias_step,
    margin_histogram,
    price_now,
    quantile_bias,
    step_within,
)
from .metrics import (
    DEAD_THRESHOLD,
    dead_experts,
    gini,
    max_relative_load,
    max_vio,
    mutual_information,
    mutual_information_bias,
    noise_floor,
    normalised_entropy,
    relative_load,
    summarise,
)
from .placement import busiest_rank, experts_per_rank, least_busiest_rank, spread_experts
from .potentials import POTENTIALS, Potential, centred_price, get_potential
from .pricing import SCORINGS, price_gradient, price_of_load, routing_probs, sequence_price
