"""Gates of remote code (the first DeepSeek-MoE, Moonlight): found, charged, counted and biased as those of transformers."""

import pytest
import torch
import torch.nn.functional as F
from charging import COEF, gradients
from checks import assert_same
from remote import REMOTE, remote_model
from tiny import set_prices, tiny_batch

import hf_phibalance as phb
from hf_phibalance.maths import routing_probs


def remote_logits(model, batch, probs):
    """Logits of each gate, from the hidden states that it received."""
    logits, handles = [], []
    for layer in model.model.layers:

        def note(module, args):
            logits.append(F.linear(args[0].view(-1, args[0].shape[-1]), module.weight))

        handles.append(layer.gate.register_forward_pre_hook(note))
    model(**batch)
    for handle in handles:
        handle.remove()
    return [routing_probs(z, probs) for z in logits]


@pytest.mark.parametrize("kind", REMOTE)
def test_remote_gate_gradient_is_that_of_the_definition(kind):
    model = remote_model(kind)
    batch = tiny_batch(model)
    phb.patch(model, {"coef": COEF})
    balancer = set_prices(model)
    assert balancer.layer_names == ["model.layers.0.gate", "model.layers.1.gate"]
    charged = gradients(model, batch)
    balancer.step()
    prices = phb.get_balancer(phb.patch(set_prices(model).root, {"coef": 0.0})).prices()
    for layer in model.model.layers:
        layer.gate.alpha = 0.0 if kind == "moonlight" else 1e-300
    task = gradients(model, batch)
    phb.get_balancer(model).discard_step()
    model.zero_grad()
    mask = batch["attention_mask"].reshape(-1).float()
    probs = remote_logits(model, batch, "sigmoid" if kind == "moonlight" else "softmax")
    term = sum(((p * q).sum(-1) * mask).sum() / mask.sum() for p, q in zip(probs, prices.values()))
    (COEF * term).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
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
    state = balancer.state_dict()
    for name, tensor in state.items():
        if name.endswith(".bias"):
            tensor.zero_()[2:4] = 50.0
    balancer.load_state_dict(state)
    gradients(model, batch)
    topk_idx, topk_weight = chosen[1]
    assert torch.equal(topk_idx.sort().values, torch.tensor([2, 3]).expand(16, 2))
    assert topk_weight.max() < 1.0  # the weights are the unbiased ones
    if kind == "moonlight":
        for layer, bias in zip(model.model.layers, balancer.biases().values()):
            assert torch.equal(layer.gate.e_score_correction_bias, bias)


def test_auxiliary_loss_of_the_remote_gate_is_off_and_comes_back(warned):
    model, plain, without = remote_model("deepseek"), remote_model("deepseek"), remote_model("deepseek")
    for layer in without.model.layers:
        layer.gate.alpha = 1e-300
    batch = tiny_batch(model)
    with_loss = gradients(plain, batch)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.1})
    assert len(warned.about("auxiliary loss")) == 1
    phb.patch(model)  # once more changes nothing
    assert_same(gradients(model, batch), gradients(without, batch))
    assert any(not torch.equal(gradient, with_loss[name]) for name, gradient in gradients(model, batch).items())
    phb.unpatch(model)
    assert [layer.gate.alpha for layer in model.model.layers] == [0.05, 0.05]
    assert_same(gradients(model, batch), with_loss)
    phb.patch(model, {"coef": 0.0})  # both levers off: the loss stays
    assert_same(gradients(model, batch), with_loss)
