"""What a biased selection ranks: experts of no probability come last, logits of 0 are scores like any other."""

import torch

from hf_phibalance.routers.selection import rank_scores


BIAS = torch.tensor([0.0, 0.9, -0.9, 0.5])


def test_no_bias_is_enough_for_an_expert_of_no_probability():
    for faint in (0.0, 1e-45, 1e-31):
        scores = torch.tensor([[0.6, faint, 0.1, 0.3]])
        assert rank_scores(scores, BIAS).tolist()[0][1] == -torch.inf
        torch.testing.assert_close(rank_scores(scores, BIAS)[0, [0, 2, 3]], scores[0, [0, 2, 3]] + BIAS[[0, 2, 3]])
    small = torch.tensor([[0.6, 1e-20, 0.1, 0.3]])
    assert torch.equal(rank_scores(small, BIAS), small + BIAS)


def test_logits_of_zero_are_scores():
    for scores in (torch.tensor([[0.3, 0.0, -2.0, 1.0]]), torch.zeros(2, 4)):
        assert torch.equal(rank_scores(scores, BIAS), scores + BIAS)
    masked = torch.tensor([[0.3, -torch.inf, 2.0, 0.0]])
    assert torch.equal(rank_scores(masked, BIAS), masked + BIAS)


def test_a_group_that_was_not_chosen_stays_out():
    scores = torch.tensor([[0.3, 0.0, 0.2, 0.0], [-1.0, 0.0, 0.2, 0.0]])
    ranked = rank_scores(scores, BIAS, zero_is_masked=True)
    assert torch.equal(ranked == -torch.inf, scores == 0)
