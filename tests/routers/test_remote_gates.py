"""Gates of remote code (the first DeepSeek-MoE, Moonlight): found, priced, counted and biased like those of transformers."""

import pytest
import torch
from charging import COEF, by_weights, gradients
from checks import assert_same
from remote import REMOTE, remote_model
from tiny import set_prices, tiny_batch

import hf_phibalance as phb


def without_auxiliary_loss(model, alpha=1e-300):
    for layer in model.model.layers:
        layer.gate.alpha = alpha
    return model


@pytest.mark.parametrize("kind", REMOTE)
def test_remote_gate_gradient_is_that_of_the_definition(kind):
    model = remote_model(kind)
    batch = tiny_batch(model)
    phb.patch(model, {"coef": COEF})
    balancer = set_prices(model)
    assert balancer.layer_names == ["model.layers.0.gate", "model.layers.1.gate"]
    prices = [price.clone() for price in balancer.prices().values()]
    charged = gradients(model, batch)
    phb.unpatch(model)
    task = gradients(without_auxiliary_loss(model, 0.0 if kind == "moonlight" else 1e-300), batch)
    gates = [(layer.gate, layer.gate.weight, price) for layer, price in zip(model.model.layers, prices)]
    expected = by_weights(model, batch, gates, "sigmoid" if kind == "moonlight" else "softmax")
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for name, gradient in charged.items():
        added = gradient - task.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(added, expected.get(name, torch.zeros_like(gradient)), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["deepseek", "moonlight"])
def test_remote_gate_counts_and_selection_bias(kind):
    model = phb.patch(remote_model(kind), {"coef": 0.0, "bias_coef": 0.5, "ema_rate": 1.0})
    balancer, batch = phb.get_balancer(model), tiny_batch(model)
    assert all(bool(site.native_bias) == (kind == "moonlight") for site in balancer.sites)
    chosen = []
    model.model.layers[0].gate.register_forward_hook(lambda module, args, output: chosen.append(output[:2]))
    gradients(model, batch)
    balancer.step()
    mask = batch["attention_mask"].reshape(-1).bool()
    counts = torch.bincount(chosen[0][0][mask].flatten(), minlength=8).float()
    assert torch.equal(balancer.loads()["model.layers.0.gate"], counts)
    biases = balancer.biases()
    for bias in biases.values():
        bias.zero_()[2:4] = 50.0
    balancer.set_biases(biases)
    gradients(model, batch)
    topk_idx, topk_weight = chosen[1]
    assert torch.equal(topk_idx.sort().values, torch.tensor([2, 3]).expand(16, 2))
    assert topk_weight.max() < 1.0  # the weights are the unbiased ones
    if kind == "moonlight":
        for layer, bias in zip(model.model.layers, balancer.biases().values()):
            assert torch.equal(layer.gate.e_score_correction_bias, bias)


def test_auxiliary_loss_of_the_remote_gate_is_off_and_comes_back(warned):
    model, plain, without = (remote_model("deepseek") for _ in range(3))
    batch = tiny_batch(model)
    with_loss = gradients(plain, batch)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.1})
    assert len(warned.about("auxiliary loss")) == 1
    phb.patch(model)  # a second patch changes nothing
    assert_same(gradients(model, batch), gradients(without_auxiliary_loss(without), batch))
    assert any(not torch.equal(gradient, with_loss[name]) for name, gradient in gradients(model, batch).items())
    phb.unpatch(model)
    assert [layer.gate.alpha for layer in model.model.layers] == [0.05, 0.05]
    assert_same(gradients(model, batch), with_loss)
    phb.patch(model, {"coef": 0.0})  # nothing is on: the loss stays
    assert_same(gradients(model, batch), with_loss)
