"""
Choices given from outside, under `balancer.replaying()`: loads count what was used, the price gradient is exact, biases hold.
"""

from collections import Counter

import pytest
import torch
from references import price_loss, routed, routers
from replay import replayed
from steps import assert_gradient, build, difference, loss_gradient, micro_batches, step_gradient
from tiny import set_prices

import hf_phibalance as phb


FAMILIES = ("mixtral", "deepseek_v3")  # our bias, and one of the family's own
COEF, RATE = 5.0, 0.3


def drawn_choices(model, batch, seed=0):
    """Two different experts for each token, that no router would have chosen."""
    generator = torch.Generator().manual_seed(seed)
    tokens = batch["input_ids"].numel()
    return {
        name: torch.rand(tokens, 8, generator=generator).topk(router.top_k).indices
        for name, router in routers(model).items()
    }


def counts(chosen, batch):
    found = Counter(chosen[batch["attention_mask"].flatten().bool()].flatten().tolist())
    return torch.tensor([float(found[e]) for e in range(8)])


def native(model):
    found = {name: getattr(r, "e_score_correction_bias", None) for name, r in routers(model).items()}
    return {name: bias.clone() for name, bias in found.items() if bias is not None}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "reentrant"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_and_loads(model_type, checkpointing):
    model = build(model_type, checkpointing)
    (batch,) = micro_batches(model, [(3, 8)])
    choices = drawn_choices(model, batch)
    with replayed(model, choices):
        plain = step_gradient(model, [batch])
        phb.patch(model, {"coef": COEF, "bias_coef": 0.01, "ema_rate": RATE})
        balancer = set_prices(model)
        prices, load_before = balancer.prices(), balancer.means("load")
        with balancer.replaying():
            added = difference(step_gradient(model, [batch]), plain)
        phb.unpatch(model)
        model.gradient_checkpointing_disable()
        expected = loss_gradient(model, [batch], [(COEF, price_loss(prices))])
    assert_gradient(added, expected)
    for name, load in balancer.loads().items():
        used = counts(choices[name], batch)
        torch.testing.assert_close(load, used)
        expected_mean = (1 - RATE) * load_before[name] + RATE * used / used.sum()
        torch.testing.assert_close(balancer.means("load")[name], expected_mean)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_biases_hold(model_type):
    """Over steps that replay the biases keep every bit, wherever they are; a step that does not moves them again."""
    model = build(model_type)
    phb.patch(model, {"coef": 0.01, "bias_coef": 0.02})
    balancer = phb.get_balancer(model)
    batches = micro_batches(model, [(3, 8)] * 4)
    step_gradient(model, batches[:1])
    before, own, prices = balancer.biases(), native(model), balancer.prices()
    assert all(bias.abs().max() > 0 for bias in before.values()) and bool(own) is (model_type == "deepseek_v3")
    for batch in batches[1:3]:
        with balancer.replaying(), replayed(model, drawn_choices(model, batch)):
            step_gradient(model, [batch])
    assert all(torch.equal(bias, before[name]) for name, bias in balancer.biases().items())
    assert all(torch.equal(bias, own[name]) for name, bias in native(model).items())
    assert all(not torch.equal(price, prices[name]) for name, price in balancer.prices().items())
    step_gradient(model, batches[3:])
    assert all(not torch.equal(bias, before[name]) for name, bias in balancer.biases().items())
    assert all(not torch.equal(bias, own[name]) for name, bias in native(model).items())


@pytest.mark.parametrize("mixed", [False, True])
def test_one_replayed_micro_batch_holds_the_bias(mixed):
    """A step whose micro-batches are partly replayed says nothing clear about the bias either."""
    model = build("mixtral")
    phb.patch(model, {"coef": 0.01, "bias_coef": 0.02})
    balancer = phb.get_balancer(model)
    first, second = micro_batches(model, [(3, 8), (2, 8)])
    balancer.begin_step([first, second])
    with balancer.replaying(), replayed(model, drawn_choices(model, first)):
        model(**first).loss.backward()
    if mixed:
        model(**second).loss.backward()
    balancer.step()
    assert all((bias == 0).all() for bias in balancer.biases().values())


def test_own_bias_does_not_act():
    """A router that ranks for itself, to see whether the rollout agrees, ranks without our bias while replaying."""
    model = build("mixtral")
    batch = micro_batches(model, [(2, 8)])[0]
    with routed(model) as seen:
        model(**batch)
    plain = {name: chosen for name, ((_, chosen),) in seen.items()}
    phb.patch(model, {"coef": 0.0, "bias_coef": 1.0})
    balancer = phb.get_balancer(model)
    state = balancer.state_dict()
    steep = torch.linspace(-9.0, 9.0, 8)
    balancer.load_state_dict({name: steep if name.endswith(".bias") else value for name, value in state.items()})
    found = {}
    for context in ("replaying", "own"):
        with routed(model) as seen, balancer.replaying() if context == "replaying" else torch.enable_grad():
            model(**batch)
        found[context] = {name: chosen for name, ((_, chosen),) in seen.items()}
        balancer.discard_step()
    assert all(torch.equal(found["replaying"][name], chosen) for name, chosen in plain.items())
    assert all((found["own"][name] >= 6).all() for name in plain)
