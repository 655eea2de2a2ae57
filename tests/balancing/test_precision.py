"""`fp32_routers`: routers of a 16-bit model are trained in float32, and the forward computes what it computed before."""

import copy
import tempfile

import pytest
import torch
from checks import assert_same
from peft import LoraConfig, get_peft_model
from steps import FAMILIES
from tiny import MODEL_TYPES, UNBUILDABLE, tiny_batch, tiny_model
from training import make_trainer

import hf_phibalance as phb


pytestmark = pytest.mark.slow


ON = {"coef": 0.01, "fp32_routers": True}


def in_16_bits(model_type="mixtral"):
    """As transformers loads it: some families keep their routers in float32 anyway."""
    model = tiny_model(model_type)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=torch.bfloat16).train()


def router_weights(model):
    balancer = phb.get_balancer(model)
    return {id(p): p for site in balancer.sites for module in site.modules for p in module.parameters()}.values()


@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in (*UNBUILDABLE, "doge")])
def test_the_forward_and_its_gradient_are_those_of_16_bits(model_type):
    plain, model = (phb.patch(in_16_bits(model_type).eval(), {"coef": 0.01, **extra}) for extra in ({}, ON))
    batch = tiny_batch(model)
    assert {p.dtype for p in router_weights(model)} == {torch.float32}
    gradients = {}
    for one in (plain, model):
        output = one(**batch)
        output.loss.backward()
        gradients[one] = {name: p.grad.float() for name, p in one.named_parameters() if p.grad is not None}
    assert_same(gradients[model], gradients[plain])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    phb.unpatch(model)
    assert_same(model.state_dict(), phb.unpatch(plain).state_dict())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_small_steps_are_not_rounded_away(model_type):
    """After 30 steps the routers have moved as float32 copies do that get the same gradients."""
    model = phb.patch(in_16_bits(model_type), ON)
    weights = list(router_weights(model))
    start = [p.detach().clone() for p in weights]
    optimizer = torch.optim.SGD(weights, lr=1e-4)
    copies = [p.detach().clone() for p in weights]
    for seed in range(30):
        model(**tiny_batch(model, seed=seed)).loss.backward()
        for own, p in zip(copies, weights):
            own -= 1e-4 * p.grad
        optimizer.step()
        model.zero_grad()
    for p, own, was in zip(weights, copies, start):
        torch.testing.assert_close(p, own, rtol=1e-6, atol=1e-9)
        assert (p - was).norm() > 5 * (own.bfloat16() - was).norm() or (p != was).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["whole routers", "routers by LoRA", "attention"])
def test_adapters(kind):
    options = {
        "whole routers": {"target_modules": ["q_proj"], "modules_to_save": ["gate"]},
        "routers by LoRA": {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]},
        "attention": {"target_modules": ["q_proj"]},
    }[kind]
    plain, model = (
        get_peft_model(phb.patch(in_16_bits(), {"coef": 0.01, **extra}), LoraConfig(r=2, **options)).eval()
        for extra in ({}, ON)
    )
    model.load_state_dict({name: value.clone() for name, value in plain.state_dict().items()}, strict=False)
    batch = tiny_batch(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    trained = [p for name, p in model.named_parameters() if p.requires_grad and "gate" in name]
    assert {p.dtype for p in trained} <= {torch.float32}
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in trained)


def test_a_copy_a_save_and_a_cast(tmp_path):
    model = phb.patch(in_16_bits().eval(), ON)
    batch = tiny_batch(model)
    with torch.no_grad():
        for p in router_weights(model):
            p += 1e-4 * p
        expected = model(**batch).logits
        assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
        model.save_pretrained(tmp_path)
        loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
        plain = phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=False)
        assert torch.equal(loaded(**batch).logits, plain(**batch).logits)
        assert {p.dtype for p in router_weights(loaded)} == {torch.float32}
        phb.patch(model.to(torch.bfloat16))  # as trainers do it
        assert {p.dtype for p in router_weights(model)} == {torch.float32}
        phb.patch(model, {"coef": 0.01})
        assert {p.dtype for p in router_weights(model)} == {torch.bfloat16}


def test_a_trainer_resumes_exactly(tmp_path, caplog):
    runs = {}
    for name in ("whole", "resumed"):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": True, "learning_rate": 1e-5}
        trainer = make_trainer(phb.patch(in_16_bits(), ON), tmp_path / name, **options)
        trainer.train()
        if name == "resumed":
            trainer = make_trainer(phb.patch(in_16_bits(), ON), tmp_path / name, **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        runs[name] = trainer.model.state_dict()
    assert_same(runs["resumed"], runs["whole"])
    assert "rounded away" not in caplog.text


def test_a_whole_graph(tmp_path):
    model = phb.patch(in_16_bits().eval(), ON)
    batch = tiny_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(**batch).logits
    assert torch.equal(found, expected)


def test_only_a_bool():
    with pytest.raises(ValueError, match=r"`fp32_routers` must be True or False, got 'yes'"):
        phb.PhiBalanceConfig(fp32_routers="yes")
