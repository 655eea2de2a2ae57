"""A step of a bias that goes no farther than its reach: the projection, against bisection in float64."""

import pytest
import torch

from hf_phibalance.maths import step_within


def naive(bias, step, reach):
    """The nearest vector to bias + step with its mean and |b_e - mean| <= limit_e: clamp(off - λ), λ by bisection."""
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


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("size", [0.001, 0.1, 1.0, 100.0])
def test_a_step_is_projected(experts, size):
    generator = torch.Generator().manual_seed(experts)
    reach = torch.ones(2, experts)
    bias = torch.full((2, experts), 5.0)
    cut = 0
    for _ in range(40):
        step = size * torch.randn(2, experts, generator=generator)
        step[:, : max(1, experts // 4)] += 2 * size  # what is masked
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
