"""Adapters on models that read images: the language model's routers and experts, the vision tower only where it is asked for."""

import pytest
import torch
from adapters import fill
from peft import get_peft_model
from tiny import tiny_model
from tiny_vlm import image_batch, tiny_image_model

import hf_phibalance as phb


TOWERS = ("vision_tower", "visual", "vision_model")


@pytest.mark.parametrize("vision", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "ernie4_5_vl_moe", "dots3_note"])
def test_what_learns(model_type, vision):
    model = tiny_image_model(model_type)
    routers = {name for name, _ in model.named_modules() if name.endswith((".gate", "_moe.gate"))}
    in_tower = {name for name in routers if any(tower in name for tower in TOWERS)}
    config = phb.lora_config(model, router="lora", vision=vision, r=2)
    model = get_peft_model(model, config)
    fill(model, "lora_B", 0.1)
    phb.patch(model.train(), {"coef": 0.5})
    batches = [
        image_batch(model.get_base_model(), pictures, seed=i) for i, pictures in enumerate((((24, 16),), (None,)))
    ]
    report = phb.doctor(model, batches)
    assert report.coefficient.ratio == pytest.approx(1, abs=1e-3), report
    phb.get_balancer(model).begin_step(batches)
    for batch in batches:
        model(**batch).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert all("lora_" in name for name in learning)
    assert any(tower in name for name in learning for tower in TOWERS) is vision
    for router in routers - (set() if vision else in_tower):
        assert any(router in name for name in learning), router
    assert any("experts" in name for name in learning) and any("self_attn" in name for name in learning)


def test_a_model_without_a_tower_has_none_to_train():
    with pytest.raises(ValueError, match="no vision tower"):
        phb.lora_config(tiny_model("mixtral"), vision=True)


def test_a_frozen_tower_is_counted_and_nothing_else():
    """Its routers get no gradient, but their loads are reported, and the language model is charged as ever."""
    model = tiny_image_model("dots3_note").train()
    model.model.vision_tower.requires_grad_(False)
    balancer = phb.get_balancer(phb.patch(model, {"coef": 0.5}))
    for seed in range(2):
        batch = image_batch(model, seed=seed)
        balancer.begin_step([batch])
        model(**batch).loss.backward()
        balancer.step()
    gate = model.model.vision_tower.blocks[1].mlp.gate
    assert gate.weight.grad is None and balancer.metrics()["vision/tokens"] == len(batch["pixel_values"])
    assert torch.isfinite(model.model.language_model.layers[1].mlp.gate.weight.grad).all()
