"""A selection bias as a shift of logits, and the shift as a part of a weight, against the definition and float64 loops."""

import pytest
import torch

from hf_phibalance.maths import ShiftMoments, fold_shift, logit_shift, score_slope, selection_threshold


FORWARD = {"logits": lambda z: z, "probs": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid}


def drawn(tokens=40, experts=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator), 0.03 * torch.randn(experts, generator=generator)


def choice(scores):
    return scores.topk(2).indices.sort(-1).values


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_threshold_lies_between_the_last_chosen_and_the_next(top_k):
    scores, _ = drawn()
    for row, threshold in zip(scores.tolist(), selection_threshold(scores, top_k)[:, 0].tolist()):
        row = sorted(row, reverse=True)
        expected = (row[top_k - 1] + row[top_k]) / 2 if top_k < 8 else row[-1]
        assert threshold == pytest.approx(expected, rel=1e-6)
    masked = torch.tensor([[0.5, float("-inf"), 0.25, float("-inf")]])
    assert selection_threshold(masked, 2).item() == 0.25  # the last chosen, if all others are masked


@pytest.mark.parametrize("ranked", list(FORWARD))
def test_shifted_logits_choose_what_biased_scores_choose(ranked):
    changed = 0
    for seed in range(20):
        z, bias = (part.double() for part in drawn(seed=seed))
        biased = FORWARD[ranked](z) + bias
        shifted = z + logit_shift(bias, selection_threshold(biased, 2), ranked)
        assert torch.equal(choice(shifted), choice(biased))
        changed += int((choice(biased) != choice(z)).any(-1).sum())
    assert changed > 20  # of 800 tokens: the bias matters


@pytest.mark.parametrize("ranked", list(FORWARD))
def test_shifts_stay_finite_for_any_bias(ranked):
    z, _ = drawn()
    for width in (0.0, 1.0, 50.0):
        bias = torch.linspace(-width, width, 8)
        shift = logit_shift(bias, selection_threshold(FORWARD[ranked](z) + bias, 2), ranked)
        assert torch.isfinite(shift).all()
        assert (shift.diff(dim=-1) >= -1e-5).all()  # a larger bias never gives a smaller shift


@pytest.mark.parametrize("ranked", list(FORWARD))
def test_slope_is_that_of_the_score(ranked):
    z = torch.linspace(-3, 3, 7, dtype=torch.float64).requires_grad_()
    score = {"logits": z, "probs": z.exp() / 100, "sigmoid": z.sigmoid()}[
        ranked
    ]  # one of many experts barely changes Z
    (slope,) = torch.autograd.grad(score.sum(), z)
    torch.testing.assert_close(score_slope(score.detach()[:, None], ranked)[:, 0], slope)


def naive_ridge(rows, targets, ridge):
    """(Σ x xᵀ / N + λ)⁻¹ Σ x βᵀ / N by float64 loops and Gauss-Jordan elimination."""
    size, width, count = len(rows[0]), len(targets[0]), len(rows)
    left = [[sum(r[i] * r[j] for r in rows) / count for j in range(size)] for i in range(size)]
    right = [[sum(r[i] * t[j] for r, t in zip(rows, targets)) / count for j in range(width)] for i in range(size)]
    damping = ridge * sum(left[i][i] for i in range(size)) / size
    for i in range(size):
        left[i][i] += damping
    for i in range(size):
        for k in range(size):
            factor = left[k][i] / left[i][i] if k != i else 0.0
            left[k] = [a - factor * b for a, b in zip(left[k], left[i])]
            right[k] = [a - factor * b for a, b in zip(right[k], right[i])]
    return torch.tensor([[value / left[i][i] for value in right[i]] for i in range(size)], dtype=torch.float64)


def gathered(x, shift, parts=3):
    moments = ShiftMoments.zeros(x.shape[1], shift.shape[1], x)
    for piece in zip(x.chunk(parts), shift.chunk(parts)):
        moments.add(*piece)
    return moments


def test_weight_is_the_ridge_regression_of_the_shifts():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator) + torch.tensor([2.0, 0, 0, 1, 0])
    shift = torch.randn(60, 3, generator=generator) + torch.tensor([0.5, 0, -0.5])
    folded = fold_shift(gathered(x, shift), own_bias=False, ridge=1e-2)
    expected = naive_ridge(x.tolist(), shift.tolist(), 1e-2).T
    torch.testing.assert_close(folded.weight, expected, rtol=1e-5, atol=1e-6)
    constant = naive_ridge(x.tolist(), [[1.0]] * 60, 1e-2)[:, 0]
    torch.testing.assert_close(folded.constant, constant, rtol=1e-5, atol=1e-6)
    assert folded.bias is None
    assert folded.r2 == pytest.approx(float(x.double().mean(0) @ constant), rel=1e-5)
    missed = (shift - x @ expected.T.float()).square().sum()
    assert folded.explained == pytest.approx(1 - float(missed / shift.square().sum()), rel=1e-4)


def test_bias_of_the_router_takes_the_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator) + 1
    shift = 0.3 * torch.randn(60, 3, generator=generator) + torch.tensor([0.5, 0, -0.5])
    folded = fold_shift(gathered(x, shift), own_bias=True, ridge=1e-2)
    slope = naive_ridge((x - x.mean(0)).tolist(), (shift - shift.mean(0)).tolist(), 1e-2)
    torch.testing.assert_close(folded.weight, slope.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(folded.bias, shift.double().mean(0) - x.double().mean(0) @ slope, rtol=1e-4, atol=1e-6)
    missed = (shift - x @ folded.weight.T.float() - folded.bias.float()).square().sum()
    assert folded.explained == pytest.approx(1 - float(missed / shift.square().sum()), rel=1e-3)
    assert folded.r2 == 1.0


@pytest.mark.parametrize("ranked", ["logits", "probs"])
def test_a_constant_input_is_as_good_as_a_bias(ranked):
    """All choices are those of the bias for logits. For probabilities, only choices within the spread of τ can change."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(400, 5, generator=generator), torch.ones(400, 1)], 1).double()
    weight = torch.randn(8, 6, generator=generator).double() * 0.5
    bias = {"logits": 0.4, "probs": 0.03}[ranked] * torch.randn(8, generator=generator).double()
    z = x @ weight.T
    biased = FORWARD[ranked](z) + bias
    shift = logit_shift(bias, selection_threshold(biased, 2), ranked)
    folded = fold_shift(gathered(x, shift), own_bias=False, ridge=1e-12)
    plain = x @ (weight + folded.weight).T
    assert folded.r2 == pytest.approx(1.0)
    changed = (choice(plain) != choice(biased)).any(-1)
    if ranked == "logits":
        assert not changed.any()
    else:
        off = (plain - z - shift).abs().amax(-1)  # distance of the common shift from each token's own
        ahead = (z + shift).topk(3).values.diff(dim=-1)[:, 1].abs()
        assert changed.any() and (ahead[changed] <= 2 * off[changed]).all()
    assert changed.sum() < 0.5 * (choice(z) != choice(biased)).any(-1).sum()


def test_no_token_is_refused():
    with pytest.raises(ValueError, match="no token"):
        fold_shift(ShiftMoments.zeros(3, 2, torch.zeros(0)), own_bias=False)
