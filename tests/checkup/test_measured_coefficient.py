"""The coefficient that a step receives, measured: 1 where the promise holds, and what it is where something breaks it."""

import pytest
import torch
from adapters import balanced, fill
from peft import get_peft_model
from tiny import tiny_batch, tiny_model
from training import make_trainer, patched
from transformers import Trainer
from trl import SFTTrainer

import hf_phibalance as phb


COEF = 0.01  # the default, far below the task's gradient


def check(report, name):
    return next(check for check in report.checks if check.name == name)


def build(policy=None, **config):
    model = tiny_model("mixtral").train()
    if policy is not None:
        model = get_peft_model(model, phb.lora_config(model, **policy))
        fill(model, "lora_B", 0.1)
    return phb.patch(model, {"coef": COEF, **config})


@pytest.mark.parametrize(
    "cls, accumulation, policy, reentrant",
    [
        (Trainer, 1, None, None),
        (Trainer, 4, None, True),
        (Trainer, 4, {"router": "lora"}, False),
        (SFTTrainer, 1, None, True),
        (SFTTrainer, 4, None, None),
        (SFTTrainer, 4, {"router": "lora"}, True),
    ],
)
def test_it_is_the_declared_one(tmp_path, cls, accumulation, policy, reentrant):
    checkpointing = {"gradient_checkpointing": False}
    if reentrant is not None:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = make_trainer(build(policy), tmp_path, cls, gradient_accumulation_steps=accumulation, **checkpointing)
    phb.attach(trainer)
    report = phb.doctor(trainer)
    found = report.coefficient
    assert report.status == "ok", str(report)
    assert found.declared == COEF and abs(found.ratio - 1) < 1e-4 and found.residual < 1e-4
    assert len(found.by_router) == 3 and all(abs(ratio - 1) < 1e-4 for ratio in found.by_router.values())
    assert f"{accumulation} micro-batch" in report.measured and cls.__name__ in report.measured


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "llama4_text", "dbrx"])
@pytest.mark.parametrize(
    "config",
    [
        {"coef": COEF, "bias_coef": 0.1, "z_loss_coef": 0.1},
        {"method": "switch"},
        {"method": "pooled"},
        {"coef": COEF, "token_mask": "labels", "price_from": "global"},
    ],
    ids=["both_and_z_loss", "switch", "pooled", "global"],
)
def test_other_families_and_methods(model_type, config):
    model = phb.patch(tiny_model(model_type).train(), config)
    found = phb.doctor(model, [tiny_batch(model, seed=seed) for seed in range(2)]).coefficient
    assert abs(found.ratio - 1) < 1e-4 and found.residual < 1e-3


def test_frozen_routers_are_measured_below():
    found = phb.doctor(balanced(tiny_model("qwen3_moe"), targets="attention")).coefficient
    assert "of which none learns" in found.parameters and not found.by_router
    assert abs(found.ratio - 1) < 1e-4


def test_dropout_is_the_same_in_every_run(tmp_path):
    model = patched(model_args={"attention_dropout": 0.5}, coef=COEF)
    assert phb.doctor(model).coefficient.residual < 1e-4


class Scaled(Trainer):
    """Scales its loss, and its gradients back: those of the prices are not scaled with the loss."""

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 8
        return loss


def test_a_trainer_that_scales_gradients(tmp_path):
    trainer = make_trainer(build(), tmp_path, Scaled, gradient_accumulation_steps=1)
    phb.attach(trainer)
    report = phb.doctor(trainer)
    assert report.coefficient.ratio == pytest.approx(1 / 8, rel=1e-4)
    assert check(report, "coefficient").status == "problem" and "ratio 0.1250" in str(report)


def test_a_hook_that_is_gone():
    """The price of one layer is not charged: its router is the one with nothing."""
    model = build()
    name = phb.get_balancer(model).layer_names[-1]
    gate = model.get_submodule(name)
    gate._forward_hooks.pop(next(k for k, hook in gate._forward_hooks.items() if type(hook).__name__ == "RouterHook"))
    report = phb.doctor(model)
    assert abs(report.coefficient.by_router[name]) < 1e-3
    assert f"{name} 0.0000" in check(report, "coefficient").finding
    assert name in check(report, "patch").finding and check(report, "patch").status == "problem"


def test_fp16_at_a_scale_that_overflows(tmp_path):
    """Measured at a lower loss scale; the one of the training stays."""
    model = phb.patch(tiny_model("mixtral", dtype=torch.float16).train(), {"coef": COEF})
    trainer = make_trainer(model, tmp_path, max_steps=1)
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    phb.attach(trainer)
    report = phb.doctor(trainer)
    assert abs(report.coefficient.ratio - 1) < 1e-2 and not report.coefficient.precise
    assert "lower loss scale" in check(report, "coefficient").finding
    assert scaler.get_scale() == 2.0**24
