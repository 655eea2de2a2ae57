"""Duals without a model: routers of given sizes, the counts of made-up steps, and reference means in float64."""

import torch

from hf_phibalance import PhiBalanceConfig
from hf_phibalance.balancing.counts import Counts
from hf_phibalance.balancing.duals import LOGIT_WIDTH, Duals
from hf_phibalance.config import STATISTICS
from hf_phibalance.maths import BINS, margin_histogram
from hf_phibalance.routers import RouterSite


def make_duals(config, sizes, top_k=2, width=1.0):
    """Returns duals of a router for each of `sizes` (numbers of experts). Scores span `width` (`None`: logits)."""
    sites = [
        RouterSite(f"router.{i}", None, size, min(top_k, size - 1) or 1, "softmax", score_width=width)
        for i, size in enumerate(sizes)
    ]
    config = config if isinstance(config, PhiBalanceConfig) else PhiBalanceConfig(**config)
    return Duals(config, sites, torch.device("cpu"))


def rows_of(duals, values_LE):
    """Returns the values `(L, E)` of each router without padding."""
    return [row[: site.num_experts] for row, site in zip(values_LE, duals.sites)]


def counts_of(duals, probs, load, scores=()):
    """Returns a step's counts from each router's `probs (E,)` and `load (E,)`. Quantile: also `scores (T, E)`."""
    counts = Counts(duals.shape, torch.device("cpu"), BINS if duals.config.rules.bias_rule == "quantile" else 0)
    for index, site in enumerate(duals.sites):
        counts.probs[index, : site.num_experts] = probs[index]
        counts.load[index, : site.num_experts] = load[index]
        if len(scores) > index:
            width, bias = site.score_width or LOGIT_WIDTH, duals.biases[index, : site.num_experts]
            mask = torch.ones(len(scores[index]))
            counts.extra[index, : site.num_experts] = margin_histogram(scores[index], bias, site.top_k, mask, width)
    counts.tokens.fill_(counts.load.sum())
    return counts


class ExactMeans:
    """Computes the means in float64, router by router, by their definition."""

    def __init__(self, duals):
        self.rate, self.duals = duals.config.ema_rate, duals
        self.means = {name: [row.double().clone() for row in rows_of(duals, duals.mean(name))] for name in STATISTICS}

    def update(self, counts):
        for name, means in self.means.items():
            for mean, sums in zip(means, rows_of(self.duals, getattr(counts, name).double())):
                if sums.sum() > 0:
                    mean.copy_((1 - self.rate) * mean + self.rate * sums / sums.sum())
