"""Saved, merged and several adapters: each comes back with its duals, and training resumes as if never interrupted. How a bias
goes with its adapter: `tests/ordinary/test_adapters_with_bias.py`."""

import pytest
import torch
from adapters import POLICIES, fill
from charging import COEF, assert_charged_as_defined
from checks import assert_same_duals
from peft import PeftModel, get_peft_model
from tiny import tiny_batch, tiny_model
from trained import logits_of
from training import make_trainer
from transformers import AutoModelForCausalLM

import hf_phibalance as phb


pytestmark = pytest.mark.slow


def trained_adapter(base, policy, steps=2, **config):
    """A patched model from the folder `base` whose adapter and duals have moved."""
    model = phb.AutoModelForCausalLM.from_pretrained(base, phi_balance={"coef": COEF, "ema_rate": 0.5, **config})
    model = get_peft_model(model, phb.lora_config(model, **policy)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for seed in range(steps):
        model(**tiny_batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        phb.get_balancer(model).step()
    return model.eval()


@pytest.mark.parametrize("policy", ["lora", "full", "router-only"])
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_adapter_comes_back_with_its_duals(model_type, policy, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    model = trained_adapter(tmp_path / "base", POLICIES[policy], bias_coef=0.1)
    expected = logits_of(model)
    assert not torch.equal(expected, logits_of(tiny_model(model_type)))
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    for flag in ({}, {"phi_balance": True}, {"phi_balance": {"coef": 0.0, "bias_coef": 0.1}}):
        loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **flag)
        if "phi_balance" not in flag or flag["phi_balance"] is True:
            assert phb.get_balancer(loaded).config == phb.get_balancer(model).config
            assert_same_duals(loaded, model)
        assert torch.equal(logits_of(loaded), expected)
    ordinary = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", phi_balance=False)
    with pytest.raises(ValueError, match="is not φ-balanced"):
        phb.get_balancer(ordinary)

    merged = model.merge_and_unload()  # an ordinary checkpoint with duals
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_duals(loaded, merged)
    assert torch.equal(logits_of(loaded), logits_of(merged))


def test_adapter_of_a_model_that_was_never_patched(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(model, phb.lora_config(model)).save_pretrained(tmp_path / "adapter")
    plain = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is not φ-balanced"):
        phb.get_balancer(plain)
    flagged = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", phi_balance=True)
    assert phb.get_balancer(flagged).steps == 0


def test_one_balancer_for_several_adapters(tmp_path):
    """A second adapter joins, learns and is saved; the first is as before; unpatching leaves both."""
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    model = trained_adapter(tmp_path / "base", {"router": "lora"})
    first, balancer = logits_of(model), phb.get_balancer(model)
    plain = tiny_model("mixtral")
    model.add_adapter("second", phb.lora_config(plain, router="lora"))
    model.set_adapter("second")
    torch.testing.assert_close(logits_of(model), logits_of(plain))
    fill(model, ".second.", 0.2)  # a fresh one does nothing
    assert phb.get_balancer(model) is balancer
    assert_charged_as_defined(model.train(), tiny_batch(model))  # patches anew
    balancer = phb.get_balancer(model)
    model.zero_grad()
    model(**tiny_batch(model)).loss.backward()
    balancer.step()
    assert balancer.steps == 3
    assert balancer.metrics()["tokens"] == tiny_batch(model)["attention_mask"].sum()  # once, not once for each adapter
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads and all(".second." in name for name in grads)
    assert any(grad.any() for name, grad in grads.items() if ".gate." in name)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    phb.unpatch(model)
    assert torch.equal(logits_of(model), first)
    phb.patch(model, {"coef": COEF}).save_pretrained(tmp_path / "adapters")
    loaded = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "adapters")
    assert torch.equal(logits_of(loaded), first)


@pytest.mark.parametrize("policy", ["lora", "full"])
def test_resumed_run_of_an_adapter_equals_the_uninterrupted_one(policy, tmp_path):
    def run(folder, resume=None, **arguments):
        model = phb.patch(tiny_model("deepseek_v3"), {"coef": COEF, "bias_coef": 0.1})
        torch.manual_seed(0)
        model = get_peft_model(model, phb.lora_config(model, **POLICIES[policy]))
        trainer = make_trainer(model, tmp_path / folder, optim="adamw_torch", save_strategy="steps", **arguments)
        phb.attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = run("whole", save_steps=2)
    resumed = run("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"), save_steps=2)
    assert_same_duals(resumed, whole)
    left, right = (dict(model.named_parameters()) for model in (resumed, whole))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert phb.get_balancer(whole).steps == 4
