"""Masked experts (score 0 or -inf) in prices and quantiles, and the projection of a bias step, against bisection in float64."""

import pytest
import torch

from hf_phibalance.maths import (
    BINS,
    SCORINGS,
    margin_histogram,
    price_gradient,
    quantile_bias,
    routing_probs,
    step_within,
)


@pytest.mark.parametrize("masked", [-torch.inf, -200.0])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_masked_experts_do_not_change_the_gradient_of_the_others(scoring, masked):
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
def test_without_any_expert_there_is_no_gradient(scoring):
    logits = torch.full((2, 4), 0.0 if scoring == "probs" else -torch.inf)
    assert not routing_probs(logits, scoring).any()
    assert not price_gradient(logits, torch.tensor([1.0, -1.0, 0.0, 0.0]), torch.ones(2), scoring).any()


def test_no_bias_is_enough_for_a_masked_expert():
    """Its margin is infinite, so it lies in the last bin. The quantile is the largest bias in range."""
    scores = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    scores[:, 2] = -torch.inf
    bias = torch.zeros(4)
    histogram = margin_histogram(scores, bias, 2, torch.ones(64), 1.0)
    assert histogram[2].tolist() == [0.0] * (BINS - 1) + [64.0]
    target = quantile_bias(histogram[None], torch.tensor([[2.0]]), bias[None], torch.ones(1, 1))[0]
    assert target.argmax() == 2 and torch.isfinite(target).all()


def test_nan_scores_stay_inside_the_histogram():
    scores = torch.rand(8, 4)
    scores[3] = torch.nan
    histogram = margin_histogram(scores, torch.zeros(4), 2, torch.ones(8), 1.0)
    assert histogram.shape == (4, BINS) and histogram.sum() == 32


def naive(bias, step, reach):
    """Nearest vector to bias + step with the same mean and |b_e - mean| <= limit_e: clamp(off - λ), with λ by bisection."""
    bias, step = bias.double().tolist(), step.double().tolist()
    experts = len(bias)
    mean = sum(bias) / experts
    limits = [max(float(r), abs(b - mean)) for r, b in zip(reach, bias)]
    scale = min(1.0, 2 * max(limits) / max(max(abs(s) for s in step), 1e-30))
    moved = [b + scale * s for b, s in zip(bias, step)]
    mean = sum(moved) / experts

    def inside(shift):
        return [min(max(m - mean - shift, -limit), limit) for m, limit in zip(moved, limits)]

    low, high = -10 * max(limits), 10 * max(limits)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(inside(middle)) > 0 else (low, middle)
    return torch.tensor([mean + x for x in inside(low)])


@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("size", [0.001, 0.1, 1.0, 100.0])
def test_a_step_is_projected(experts, size):
    generator = torch.Generator().manual_seed(experts)
    reach = torch.ones(2, experts)
    bias = torch.full((2, experts), 5.0)
    cut = 0
    for _ in range(40):
        step = size * torch.randn(2, experts, generator=generator)
        step[:, : max(1, experts // 4)] += 2 * size  # as for masked experts
        moved = step_within(bias, step, reach)
        for row in range(2):
            expected = naive(bias[row], step[row], reach[row])
            torch.testing.assert_close(moved[row], expected.float(), rtol=0, atol=3e-6 * (1 + size))
        cut += int((moved != bias + step).any())
        bias = moved
        assert (bias - bias.mean(-1, keepdim=True)).abs().max() <= 1 + 1e-5
    assert cut > 10 or size == 0.001 or experts == 1


def test_within_reach_nothing_is_changed():
    bias = torch.randn(3, 16).mul(0.2)
    step = torch.randn(3, 16).mul(0.01)
    assert torch.equal(step_within(bias, step, torch.ones(3, 16)), bias + step)
    assert torch.equal(step_within(bias, torch.zeros(3, 16), torch.full((3, 16), 1e-3)), bias)


def test_what_a_checkpoint_brought_may_come_back_but_goes_no_farther():
    bias, reach = torch.tensor([[3.0, -1.0, -1.0, -1.0]]), torch.ones(1, 4)
    step = torch.tensor([[0.3, -0.1, -0.1, -0.1]])
    torch.testing.assert_close(step_within(bias, step, reach), bias)
    back = step_within(bias, -step, reach)
    torch.testing.assert_close(back, bias - step)
    torch.testing.assert_close(step_within(back, step, reach), back)


def test_what_one_expert_must_not_take_is_shared_by_those_that_have_room():
    moved = step_within(torch.tensor([[1.0, -1.0, 0.0, 0.0]]), torch.tensor([[0.4, 0.0, 0.0, 0.0]]), torch.ones(1, 4))
    torch.testing.assert_close(moved, torch.tensor([[1.1, -0.9, 0.1, 0.1]]))
