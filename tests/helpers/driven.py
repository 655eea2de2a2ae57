"""Duals without a model: routers of given sizes, the tallies of made steps, and means in exact enough arithmetic."""

import torch

from hf_phibalance import PhiBalanceConfig
from hf_phibalance.balancing.duals import LOGIT_WIDTH, Duals
from hf_phibalance.balancing.tally import StepTally
from hf_phibalance.maths import BINS, margin_histogram
from hf_phibalance.routers import RouterSite


def make_duals(config, sizes, top_k=2, width=1.0):
    """Duals of a router for each of `sizes` (numbers of experts), whose scores span `width` (`None`: logits)."""
    sites = [
        RouterSite(f"router.{i}", None, size, min(top_k, size - 1) or 1, "softmax", score_width=width)
        for i, size in enumerate(sizes)
    ]
    return Duals(config if isinstance(config, PhiBalanceConfig) else PhiBalanceConfig(**config), sites)


def tally_of(duals, probs, load, scores=()):
    """The tally of a step: `probs` and `load` flat; for quantile balancing also `scores (T, E)` of every router."""
    tally = StepTally(duals.layout.sizes, BINS if duals.config.rules.bias_rule == "quantile" else 0)
    tally.probs.copy_(probs)
    tally.load.copy_(load)
    tally.tokens.fill_(load.sum())
    for index, (site, span) in enumerate(zip(duals.sites, duals.layout.spans)):
        if len(scores) > index:
            width = site.score_width or LOGIT_WIDTH
            mask = torch.ones(len(scores[index]))
            tally.margins_of(index).copy_(margin_histogram(scores[index], duals.bias[span], site.top_k, mask, width))
    return tally


def off_mean(duals, flat):
    """Differences of each router's values from their mean, flat."""
    return torch.cat([flat[span] - flat[span].mean() for span in duals.layout.spans])


class ExactMeans:
    """The means in float64, router by router, by their definition."""

    def __init__(self, duals):
        self.rate = duals.config.ema_rate
        self.means = {name: mean.double().clone() for name, mean in duals.means.items()}
        self.spans = duals.layout.spans

    def update(self, tally):
        for name, mean in self.means.items():
            sums = getattr(tally, name).double()
            for span in self.spans:
                if sums[span].sum() > 0:
                    mean[span] = (1 - self.rate) * mean[span] + self.rate * sums[span] / sums[span].sum()
