"""Models under PEFT, patched before or after: same gradients, same counts, duals beside the adapter."""

import os
import re

import pytest
import torch
import transformers
from adapters import ADAPTERS, LORA, adapted
from charging import COEF, assert_charged_as_defined, gradients, priced
from checks import assert_same, ours
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import set_prices, tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_peft_gradient_is_that_of_the_definition(model_type, adapter, order):
    if order == "before":
        model = adapted(priced(model_type), adapter)
    else:
        model = phb.patch(adapted(tiny_model(model_type), adapter), {"coef": COEF})
        set_prices(model)
    balancer = phb.get_balancer(model)
    assert balancer.layer_names == phb.get_balancer(priced(model_type)).layer_names
    batch = tiny_batch(model)
    assert_charged_as_defined(model, batch)
    gradients(model, batch)
    phb.get_balancer(model).step()
    assert all(load.sum() == 2 * batch["attention_mask"].sum() for load in phb.get_balancer(model).loads().values())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["parameters", "modules_to_save"])
def test_order_of_patch_and_peft_does_not_matter(adapter):
    config = {"coef": COEF, "bias_coef": 0.2, "ema_rate": 0.5}
    results = []
    for order in ("before", "after"):
        model = tiny_model("deepseek_v3")
        model = adapted(phb.patch(model, config) if order == "before" else model, adapter)
        balancer = phb.get_balancer(phb.patch(model) if order == "before" else phb.patch(model, config))
        grads = []
        for seed in range(3):
            grads.append(gradients(model, tiny_batch(model, seed=seed)))
            balancer.step()
        results.append((grads, balancer.state_dict()))
    for left, right in zip(results[0][0], results[1][0]):
        assert_same(left, right)
    assert_same(results[0][1], results[1][1])
    # the routers in use carry the bias
    buffers = {name: buffer for name, buffer in model.named_buffers() if "e_score_correction_bias" in name}
    active = {name: buffer for name, buffer in buffers.items() if "original_module" not in name}
    assert len(active) == 2
    for buffer, bias in zip(active.values(), balancer.biases().values()):
        assert bias.any() and torch.equal(buffer, bias)


def test_native_bias_reaches_copies_that_peft_makes_after_patching():
    """... without a second `patch`: in a raw loop, and when duals are loaded."""
    model = adapted(priced("deepseek_v3", {"bias_coef": 0.2}), "modules_to_save")
    balancer = phb.get_balancer(model)
    gates = [model.base_model.model.model.layers[i].mlp.gate.modules_to_save["default"] for i in (1, 2)]
    gradients(model, tiny_batch(model))
    balancer.step()
    for gate, bias in zip(gates, balancer.biases().values()):
        assert bias.any() and torch.equal(gate.e_score_correction_bias, bias)
    other = adapted(priced("deepseek_v3", {"bias_coef": 0.2}), "modules_to_save")
    gates = [other.base_model.model.model.layers[i].mlp.gate.modules_to_save["default"] for i in (1, 2)]
    phb.get_balancer(other).load_state_dict(balancer.state_dict())
    for gate, bias in zip(gates, balancer.biases().values()):
        assert torch.equal(gate.e_score_correction_bias, bias)


def test_state_moves_between_wrapped_and_plain_models(tmp_path):
    model = adapted(priced(), "parameters")
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    phb.get_balancer(model).save(tmp_path)
    plain = phb.patch(tiny_model("mixtral"), {"coef": COEF})
    phb.get_balancer(plain).load(tmp_path)
    assert_same(phb.get_balancer(plain).state_dict(), phb.get_balancer(model).state_dict())
    other = phb.patch(adapted(tiny_model("mixtral"), "modules_to_save"), {"coef": COEF})
    phb.get_balancer(other).load_state_dict(phb.get_balancer(plain).state_dict())
    assert_same(phb.get_balancer(other).prices(), phb.get_balancer(model).prices())


def lora_on(parameters=None, modules=None, layers=None):
    return LoraConfig(target_parameters=parameters, target_modules=modules, layers_to_transform=layers, **LORA)


def test_frozen_routers_above_trained_layers_only(warned):
    """Adapters on the last layer's attention: the gradient reaches them from the last router alone."""
    model = get_peft_model(priced(), lora_on(modules=["o_proj"], layers=[2])).train()
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    (warning,) = warned.about("reaches no trainable parameter")
    assert "model.layers.0.mlp.gate" in warning and "model.layers.1.mlp.gate" in warning
    assert "model.layers.2.mlp.gate" not in warning


def test_all_frozen_below_is_refused_with_a_remedy_that_works():
    frozen = get_peft_model(priced(), lora_on(parameters=["layers.2.mlp.experts.down_proj"], modules=[])).train()
    before = phb.get_balancer(frozen).state_dict()
    gradients(frozen, tiny_batch(frozen))
    with pytest.raises(ValueError, match=r"coef=2.0 but no gradient path") as error:
        phb.get_balancer(frozen).step()
    assert_same(phb.get_balancer(frozen).state_dict(), before)
    (suggested,) = re.findall(r"target_parameters=\['([^']+)'", str(error.value))
    model = get_peft_model(priced(), lora_on(parameters=[suggested], modules=[])).train()
    grads = gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    assert len(grads) == 6 and any(gradient.any() for gradient in grads.values())
    biased = priced("mixtral", {"coef": 0.0, "bias_coef": 0.1})  # the other remedy
    biased = get_peft_model(biased, lora_on(parameters=["layers.2.mlp.experts.down_proj"], modules=[])).train()
    gradients(biased, tiny_batch(biased))
    phb.get_balancer(biased).step()
    assert all(bias.any() for bias in phb.get_balancer(biased).biases().values())


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["parameters", "modules_to_save"])
def test_merged_model_stays_patched(adapter):
    model = adapted(priced("mixtral", {"bias_coef": 0.1}), adapter)
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    before = phb.get_balancer(model).state_dict()
    merged = model.merge_and_unload().train()
    assert phb.get_balancer(merged).layer_names == [f"model.layers.{i}.mlp.gate" for i in range(3)]
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    assert_same(phb.get_balancer(merged).state_dict(), before)
    assert_charged_as_defined(merged, tiny_batch(merged))
    gradients(merged, tiny_batch(merged))
    phb.get_balancer(merged).step()
    assert not ours(phb.unpatch(merged))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_peft_saves_the_sidecar_and_the_adapter_loads_as_ever(order, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if order == "before":
        model = phb.patch(adapted(phb.patch(base, {"coef": COEF}), "parameters"))
    else:
        model = phb.patch(adapted(base, "parameters"), {"coef": COEF})
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    model.eval().save_pretrained(tmp_path / "adapter")
    assert STATE_NAME in os.listdir(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "not written", is_main_process=False)
    assert not (tmp_path / "not written" / STATE_NAME).exists()

    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = phb.patch(PeftModel.from_pretrained(fresh, tmp_path / "adapter"), {"coef": COEF})
    phb.get_balancer(loaded).load(tmp_path / "adapter")
    assert_same(phb.get_balancer(loaded).state_dict(), phb.get_balancer(model).state_dict())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**tiny_batch(model)).logits, model(**tiny_batch(model)).logits)
    flagged = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", phi_balance={"coef": COEF})
    assert_same(phb.get_balancer(flagged).state_dict(), phb.get_balancer(model).state_dict())


def test_reference_forward_without_adapter_does_not_count():
    """As DPO does: the same model, adapters off, no gradient, in between."""
    model = adapted(priced(), "parameters")
    balancer = phb.get_balancer(model)
    expected = gradients(model, tiny_batch(model))
    balancer.discard_step()
    model.zero_grad()
    output = model(**tiny_batch(model))
    with torch.no_grad(), model.disable_adapter():
        model(**tiny_batch(model, seed=1))
    output.loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
    balancer.step()
    assert balancer.metrics()["tokens"] == tiny_batch(model)["attention_mask"].sum()
