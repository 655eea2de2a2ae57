"""Means and biases from a few batches, by forwards alone: a trained router's load is known after one pass.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..maths import SCORINGS, routing_probs, score_slope, selection_threshold, step_within
from .ascent import Ascent
from .duals import LOGIT_WIDTH
from .observation import Batch, Look, Measurement, looking, repeatable
from .patching import get_balancer


ITERATIONS = 12
FAINT = 1e-8  # slopes below are taken for this


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Batch], bias: bool = False, *, iterations: int = ITERATIONS
) -> Measurement:
    """
    Sets the running means of a patched model, and so its prices, to those of `batches`, instead of beginning uniform: weights,
    gradients, random numbers and the number of steps stay. With `bias`, also finds the selection bias under which the loads
    of these batches are even.

    ```python
    phb.patch(model, {"coef": 0.01, "bias_coef": 0.003})
    phb.calibrate(model, [next(batches) for _ in range(8)], bias=True)
    ```

    Args:
        model (`torch.nn.Module`): the patched model.
        batches (`Iterable[Mapping]`):
            What the model takes, as it will be trained on. With several ranks each gives its own, and all tokens weigh the
            same.
        bias (`bool`, *optional*, defaults to `False`): whether to set the selection bias as well.
        iterations (`int`, *optional*, defaults to `12`): passes over `batches` that this takes.

    Returns:
        `Measurement`: the loads of `batches` over all ranks under what has been set, with their MaxVio.

    Raises:
        ValueError: if the model is not patched, `batches` hold no token that counts, or there is no bias to set.
        RuntimeError: in the middle of an optimizer step.
    """
    balancer = get_balancer(model)
    if bias and not balancer.config.bias_coef:
        raise ValueError(
            "bias=True, but `bias_coef` is 0: nothing would move the bias afterwards. Patch the model with bias_coef > 0 "
            "(0.003, or the method's own), or leave the bias out."
        )
    if bias:
        batches = repeatable(batches)
        _even_out(model, batches, iterations)
    counted = _count(model, batches, with_scores=False)
    balancer.set_means({s: dict(zip(balancer.layer_names, getattr(counted, s))) for s in ("probs", "load")})
    loads = dict(zip(balancer.layer_names, (load.cpu() for load in counted.load)))
    return Measurement(loads=loads, tokens=int(counted.tokens))


class _Counts:
    """Sums over the tokens of a pass: probabilities and assignments per expert, log of the slope at the threshold, tokens."""

    def __init__(self, look: Look, with_scores: bool) -> None:
        self.look, self.with_scores = look, with_scores
        device = next(p.device for p in look.root.parameters() if p.device.type != "meta")
        exact = torch.float32 if device.type == "mps" else torch.float64
        sizes = [site.num_experts for site in look.sites]
        self._flat = torch.zeros(2 * sum(sizes) + len(sizes) + 1, dtype=exact, device=device)
        probs, load, self.slope, tokens = self._flat.split([sum(sizes), sum(sizes), len(sizes), 1])
        self.probs, self.load, self.tokens = probs.split(sizes), load.split(sizes), tokens[0]

    def slopes(self) -> list[float]:
        """The slope of each router's scores at its threshold, the geometric mean: a few sure tokens must not set the pace."""
        routed = [load_E.sum() / site.top_k for load_E, site in zip(self.load, self.look.sites)]
        return [float((slope / count.clamp(min=1)).exp()) for slope, count in zip(self.slope, routed)]

    def choice(self, index: int, logits: Tensor, chosen_Tk: Tensor) -> None:
        """Router `index` chose `chosen_Tk` by its `logits (T, E)`."""
        site, mask_T = self.look.sites[index], self.look.mask_of(index, len(logits)).to(logits.device)
        probs_NE = routing_probs(logits, site.scoring)[mask_T]
        self.probs[index].add_(probs_NE.to(self._flat).sum(0))
        self.load[index].add_(torch.bincount(chosen_Tk[mask_T].reshape(-1), minlength=site.num_experts).to(self._flat))
        if self.with_scores and site.native_bias:
            by_logits = site.kind.traits.biases == "logits"
            self.scores(index, logits if by_logits else SCORINGS[site.scoring].score(logits.float()))

    def scores(self, index: int, scores: Tensor) -> None:
        """Router `index` ranks `scores (..., E)` and its bias."""
        site = self.look.sites[index]
        scores_TE = scores.reshape(-1, site.num_experts).float()
        scores_NE = scores_TE[self.look.mask_of(index, len(scores_TE)).to(scores.device)]
        bias_E = self.look.choice_bias(index)
        biased_NE = scores_NE if bias_E is None else scores_NE + bias_E.to(scores_NE)
        bounded = bool(((scores_NE >= 0) & (scores_NE <= 1)).all())
        ranked = ("sigmoid" if site.scoring == "sigmoid" else "probs") if bounded else "logits"
        slope_N1 = score_slope(selection_threshold(biased_NE, site.top_k), ranked)
        self.slope[index] += slope_N1.clamp(min=FAINT).log().sum().to(self._flat)


def _count(model: nn.Module, batches: Iterable[Batch], with_scores: bool) -> _Counts:
    """One pass over `batches`, summed over the ranks."""
    with looking(model) as look:
        counts = _Counts(look, with_scores)
        look.on_choice = counts.choice
        with look.balancer.forwards.showing_scores(counts.scores) if with_scores else nullcontext():
            for batch in batches:
                look.forward(batch)
                counts.tokens += look.mask.sum()
        look.balancer.sum_over_ranks(counts._flat)
    if not counts.tokens:
        raise ValueError("there is nothing to calibrate on: `batches` hold no token that counts.")
    return counts


def _even_out(model: nn.Module, batches: Iterable[Batch], iterations: int) -> None:
    """Moves the biases to where the loads of `batches` are even, from where they are."""
    balancer = get_balancer(model)
    start, sites = balancer.biases(), balancer.sites
    ascent = Ascent([site.num_experts for site in sites])
    slopes: list[float] = []  # what a shift of the logits is worth in what the router ranks

    def move(shifts: Sequence[Tensor]) -> None:
        biases = {}
        for (name, bias_E), site, slope, shift_E in zip(start.items(), sites, slopes, shifts):
            reach_E = torch.full_like(bias_E, site.score_width or LOGIT_WIDTH)
            biases[name] = step_within(bias_E[None], (slope * shift_E).to(bias_E)[None], reach_E[None])[0]
        balancer.set_biases(biases)

    for _ in range(iterations):
        counts = _count(model, batches, with_scores=not slopes)
        slopes = slopes or counts.slopes()
        ascent.tell(counts.load)
        move(ascent.ask())
    move(ascent.best)
