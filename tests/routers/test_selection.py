"""The selection bias inside a router: every kind of router gets the price gradient exactly once, and the ranking respects masks."""

import types

import pytest
import torch
import torch.nn.functional as F
from charging import COEF, by_definition, gradients
from tiny import set_prices, tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.routers import BiasedTopK, rank_scores


def logits_of(router, hidden):
    return F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)


def probs_are_weights(self, hidden):
    """As in most routers."""
    logits = logits_of(self, hidden)
    return logits, *torch.topk(F.softmax(logits.float(), dim=-1), self.top_k)


def probs_only_rank(self, hidden):
    """The weights come from a second softmax, so no gradient passes the softmax over all experts."""
    logits = logits_of(self, hidden)
    chosen = torch.topk(F.softmax(logits, dim=-1), self.top_k).indices
    return logits, F.softmax(logits.gather(-1, chosen), dim=-1), chosen


def top_k_of_all(self, hidden):
    """Its softmax has one entry per expert, in the order of their rank."""
    logits = logits_of(self, hidden)
    ranked, chosen = torch.topk(logits, self.num_experts)
    return logits, F.softmax(ranked, dim=-1)[:, : self.top_k], chosen[:, : self.top_k]


def cooler(self, hidden):
    """The softmax is not of the returned logits."""
    logits = logits_of(self, hidden)
    return logits, *torch.topk(F.softmax(2 * logits, dim=-1), self.top_k)


def scaled_copy(self, hidden):
    """The weights come from a copy of the probabilities that is changed in place."""
    logits = logits_of(self, hidden)
    return logits, *torch.topk(F.softmax(logits, dim=-1).clone().mul_(3.0), self.top_k)


def over_tokens(self, hidden):
    """The softmax is over the tokens."""
    logits = logits_of(self, hidden)
    return logits, *torch.topk(F.softmax(logits, dim=0), self.top_k)


ROUTERS = (probs_are_weights, probs_only_rank, top_k_of_all, cooler, scaled_copy, over_tokens)


def with_router(forward):
    """A tiny model whose routers run `forward`."""
    model = tiny_model("mixtral").train()
    for site in phb.routers.find_routers(model):
        if site.scoring == "probs":
            pytest.skip("routers of this transformers return probabilities, the stand-ins return logits")
        for module in site.modules:
            module.forward = types.MethodType(forward, module)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_any_router_is_charged_exactly_once(router, checkpointing):
    """The added gradient is that of coef · Σ_layers mean_t ⟨q, softmax(logits)_t⟩."""
    model = with_router(router)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    batch = tiny_batch(model)
    task = gradients(model, batch)
    phb.patch(model, {"coef": COEF})
    set_prices(model)
    charged = gradients(model, batch)
    model.gradient_checkpointing_disable()
    phb.get_balancer(model).discard_step()
    phb.patch(model, {"coef": 0.0})
    expected = by_definition(model, batch)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in charged.items():
        added = gradient - task[name]
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(added)), rtol=1e-3, atol=2e-5, msg=name)


def test_the_mode_ends_with_the_forward_also_after_an_error():
    model = with_router(probs_are_weights)
    batch = tiny_batch(model)
    phb.patch(model, {"coef": COEF, "bias_coef": 0.1})
    gradients(model, batch)
    assert BiasedTopK.innermost() is None
    gate = phb.get_balancer(model).sites[1].modules[0]
    works = gate.forward

    def fails(hidden):
        works(hidden)
        raise RuntimeError("out of luck")

    gate.forward = fails
    with pytest.raises(RuntimeError, match="out of luck"):
        model(**batch)
    assert BiasedTopK.innermost() is None
    gate.forward = works
    phb.get_balancer(model).discard_step()
    gradients(model, batch)


BIAS = torch.tensor([0.0, 0.9, -0.9, 0.5])


def test_experts_of_no_probability_come_last():
    for faint in (0.0, 1e-45, 1e-31):
        scores = torch.tensor([[0.6, faint, 0.1, 0.3]])
        assert rank_scores(scores, BIAS).tolist()[0][1] == -torch.inf
        torch.testing.assert_close(rank_scores(scores, BIAS)[0, [0, 2, 3]], scores[0, [0, 2, 3]] + BIAS[[0, 2, 3]])
    small = torch.tensor([[0.6, 1e-20, 0.1, 0.3]])
    assert torch.equal(rank_scores(small, BIAS), small + BIAS)


def test_a_logit_of_zero_is_a_score_unless_it_marks_a_group_that_was_not_chosen():
    for scores in ([[0.3, 0.0, -2.0, 1.0]], [[0.0] * 4], [[0.3, -torch.inf, 2.0, 0.0]]):
        assert torch.equal(rank_scores(torch.tensor(scores), BIAS), torch.tensor(scores) + BIAS)
    grouped = torch.tensor([[0.3, 0.0, 0.2, 0.0], [-1.0, 0.0, 0.2, 0.0]])
    assert torch.equal(rank_scores(grouped, BIAS, zero_is_masked=True) == -torch.inf, grouped == 0)
