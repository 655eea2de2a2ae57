"""Whatever a softmax router does inside, it is charged exactly once, and nothing of ours stays in it."""

import types

import pytest
import torch
import torch.nn.functional as F
from charging import COEF, gradients
from tiny import set_prices, tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.routers.selection import BiasedTopK


def probs_are_weights(self, hidden):
    """As most routers do it."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
    weights, chosen = torch.topk(F.softmax(logits.float(), dim=-1), self.top_k)
    return logits, weights, chosen


def probs_only_rank(self, hidden):
    """The weights come from a softmax of their own, so no gradient goes through the one over all experts."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
    chosen = torch.topk(F.softmax(logits, dim=-1), self.top_k).indices
    return logits, F.softmax(logits.gather(-1, chosen), dim=-1), chosen


def top_k_of_all(self, hidden):
    """Its softmax has as many entries as there are experts, in the order of their rank."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
    ranked, chosen = torch.topk(logits, self.num_experts)
    weights = F.softmax(ranked, dim=-1)
    return logits, weights[:, : self.top_k], chosen[:, : self.top_k]


def cooler(self, hidden):
    """The softmax is of something else than what is returned."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
    weights, chosen = torch.topk(F.softmax(2 * logits, dim=-1), self.top_k)
    return logits, weights, chosen


def scaled_copy(self, hidden):
    """The weights come from a copy of the probabilities that is changed in place."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
    probs = F.softmax(logits, dim=-1).clone()
    return logits, *torch.topk(probs.mul_(3.0), self.top_k)


def over_tokens(self, hidden):
    """A softmax along the other axis."""
    logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
    weights, chosen = torch.topk(F.softmax(logits, dim=0), self.top_k)
    return logits, weights, chosen


ROUTERS = (probs_are_weights, probs_only_rank, top_k_of_all, cooler, scaled_copy, over_tokens)


def with_router(forward, model_type="mixtral", **overrides):
    """A tiny model whose routers run `forward`."""
    model = tiny_model(model_type, **overrides).train()
    for site in phb.routers.find_routers(model):
        if site.scoring == "probs":
            pytest.skip(
                "routers of this version of transformers return probabilities, the stand-ins here return logits"
            )
        for module in site.modules:
            module.forward = types.MethodType(forward, module)
    return model


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_any_router_is_charged_exactly_once(router, checkpointing):
    """The gradient that balancing adds == autograd of coef · Σ_layers mean_t ⟨q, softmax(logits)_t⟩."""
    model = with_router(router)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    batch = tiny_batch(model)
    task = gradients(model, batch)
    phb.patch(model, {"coef": COEF})
    balancer = set_prices(model)
    charged = gradients(model, batch)
    prices = balancer.prices()
    model.gradient_checkpointing_disable()
    phb.unpatch(model)

    logits, handles = {}, []
    for site in balancer.sites:
        note = lambda module, args, output, name=site.name: logits.__setitem__(name, output[0])  # noqa: E731
        handles += [module.register_forward_hook(note) for module in site.modules]
    model.zero_grad()
    model(**batch)
    mask = batch["attention_mask"].reshape(-1).float()
    term = sum(((F.softmax(z.float(), -1) @ prices[name]) * mask).sum() / mask.sum() for name, z in logits.items())
    (COEF * term).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in charged.items():
        added = gradient - task[name]
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(added)), rtol=1e-3, atol=2e-5, msg=name)


def test_only_what_the_router_does_is_seen():
    """A mode outlives neither its router's forward nor an error in it."""
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
    model.zero_grad()
    with pytest.raises(RuntimeError, match="out of luck"):
        model(**batch)
    assert BiasedTopK.innermost() is None
    gate.forward = works
    phb.get_balancer(model).discard_step()
    gradients(model, batch)
