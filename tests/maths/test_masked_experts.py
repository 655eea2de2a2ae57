"""Experts whose score is 0, or -inf: what they are charged, and the bias that they would need."""

import pytest
import torch

from hf_phibalance.maths import BINS, SCORINGS, margin_histogram, price_gradient, quantile_bias, routing_probs


@pytest.mark.parametrize("masked", [-torch.inf, -200.0])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_the_charge_of_the_others_is_as_if_it_were_not_there(scoring, masked):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, generator=generator)
    price, rate = torch.randn(6, generator=generator), torch.rand(5, generator=generator)
    kept = [0, 1, 3, 5]
    logits[:, [2, 4]] = 0.0 if scoring == "probs" else masked
    if scoring == "probs":
        logits[:, kept] = logits[:, kept].softmax(-1)
    leaf = logits[:, kept].double().requires_grad_()
    score = {"softmax": torch.exp, "sigmoid": torch.sigmoid, "probs": lambda z: z}.get(
        scoring, lambda z: torch.log1p(z.exp()).sqrt()
    )(leaf)
    probs = score / score.sum(-1, keepdim=True)
    (rate.double() * (probs @ price[kept].double())).sum().backward()
    charge = price_gradient(logits, price, rate, scoring)
    torch.testing.assert_close(charge[:, kept], leaf.grad.float())
    assert not charge[:, [2, 4]].any()
    torch.testing.assert_close(routing_probs(logits, scoring)[:, kept], probs.detach().float())


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus", "probs"])
def test_all_masked_is_charged_nothing(scoring):
    logits = torch.full((2, 4), 0.0 if scoring == "probs" else -torch.inf)
    assert not routing_probs(logits, scoring).any()
    assert not price_gradient(logits, torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.ones(2), scoring).any()


def test_no_bias_is_enough_for_a_masked_expert():
    """Its margin is infinite, so it lies in the last bin, and the quantile is the largest bias that is considered."""
    scores = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    scores[:, 2] = -torch.inf
    bias = torch.zeros(4)
    histogram = margin_histogram(scores, bias, 2, torch.ones(64), 1.0)
    assert histogram[2].tolist() == [0.0] * (BINS - 1) + [64.0]
    target = quantile_bias(histogram[None], torch.tensor([[2.0]]), bias[None], torch.ones(1, 1))[0]
    assert target.argmax() == 2 and torch.isfinite(target).all()


def test_scores_that_are_no_numbers_leave_the_histogram_in_its_place():
    scores = torch.rand(8, 4)
    scores[3] = torch.nan
    histogram = margin_histogram(scores, torch.zeros(4), 2, torch.ones(8), 1.0)
    assert histogram.shape == (4, BINS) and histogram.sum() == 32
