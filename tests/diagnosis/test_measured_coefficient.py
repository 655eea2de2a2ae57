"""The doctor measures the coefficient that a step receives: ratio 1 in sound set-ups, the true ratio in broken ones."""

import pytest
import torch
from adapters import balanced, fill
from peft import get_peft_model
from tiny import tiny_batch, tiny_model
from training import make_trainer
from transformers import Trainer

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


def verified(trainer):
    """The report of the first step of `trainer` that has prices."""
    callback = phb.attach(trainer, verify=True)
    trainer.train()
    return callback.report


def test_frozen_routers_are_measured_at_their_logits():
    found = phb.doctor(balanced(tiny_model("qwen3_moe"), targets="attention")).coefficient
    assert "the logits of 2 (frozen" in found.parameters and len(found.by_router) == 2
    assert abs(found.ratio - 1) < 1e-4


def test_a_schedule():
    """The declared coefficient follows the schedule. There is nothing to measure once it is 0."""
    model = build(schedule="linear", schedule_steps=4)
    balancer = phb.get_balancer(model)
    balancer.duals.steps = 3
    report = phb.doctor(model)
    assert report.coefficient.declared == COEF / 4 and abs(report.coefficient.ratio - 1) < 1e-4
    balancer.duals.steps = 4
    report = phb.doctor(model)
    assert report.coefficient is None and "schedule='linear' is over" in check(report, "coefficient").finding
    assert report.status == "ok"


def test_the_definition_is_apart_from_the_core(monkeypatch):
    """The doctor notices that the core adds a wrong gradient: by a factor at one router, by the sign at another."""
    model = build()
    balancer = phb.get_balancer(model)
    due = balancer.forwards.due

    def wrong(forward, index, routed):
        recorder, balancer.forwards.recorder = balancer.forwards.recorder, None
        weight, price = due(forward, index, routed)
        balancer.forwards.recorder = recorder
        price = price * {0: 3.0, 1: -1.0}.get(index, 1.0)
        recorder.adds(forward, index, weight, price)
        return weight, price

    monkeypatch.setattr(balancer.forwards, "due", wrong)
    report = phb.doctor(model)
    assert check(report, "coefficient").status == "problem"
    assert list(report.coefficient.by_router.values()) == pytest.approx([3.0, -1.0, 1.0], abs=1e-4)


@pytest.mark.slow
def test_a_hook_on_the_weight_of_one_router(tmp_path):
    """The gradients of half of its experts are dropped."""
    model = build()
    name = phb.get_balancer(model).layer_names[1]
    mask = (torch.arange(8) < 4).float()[:, None]
    model.get_submodule(name).weight.register_hook(lambda gradient: gradient * mask)
    trainer = make_trainer(model, tmp_path)
    callback = phb.attach(trainer, verify=True)
    with pytest.raises(ValueError, match=f"(?s)verify=True.*{name} 0"):
        trainer.train()
    by_router = callback.report.coefficient.by_router
    assert 0 < by_router.pop(name) < 1 and all(abs(ratio - 1) < 1e-4 for ratio in by_router.values())


class Overflows(Trainer):
    """Its loss is infinite in the second and third step: the first ones with prices."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * torch.inf if self.state.global_step in (1, 2) else loss


@pytest.mark.slow
def test_a_step_that_overflows_is_not_the_one_that_is_measured(tmp_path):
    trainer = make_trainer(build(), tmp_path, Overflows, max_steps=5)
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    report = verified(trainer)
    assert report.measured.startswith("optimizer step 4") and report.status == "ok", report
    assert abs(report.coefficient.ratio - 1) < 1e-4 and scaler.get_scale() == 2.0**8


@pytest.mark.slow
def test_without_a_scaler_it_is_a_problem(tmp_path):
    trainer = make_trainer(build(), tmp_path, Overflows, max_steps=5)
    with pytest.raises(ValueError, match=r"gradients of the step are not finite"):
        verified(trainer)


def test_16_bits():
    model = phb.patch(tiny_model("mixtral", dtype=torch.bfloat16).train(), {"coef": COEF})
    found = phb.doctor(model, [tiny_batch(model, seed=seed) for seed in range(3)])
    assert abs(found.coefficient.ratio - 1) < 1e-2 and not found.coefficient.precise
    assert check(found, "coefficient").status == "ok" and "weights of 3" in found.coefficient.parameters


def test_routers_kept_in_fp32_are_measured_at_their_weights():
    model = phb.patch(tiny_model("mixtral", dtype=torch.bfloat16).train(), {"coef": COEF, "fp32_routers": True})
    report = phb.doctor(model)
    assert report.status == "ok" and "weights of 3" in report.coefficient.parameters, str(report)
    assert abs(report.coefficient.ratio - 1) < 1e-2


def test_a_compiled_model_is_tried_uncompiled():
    model = build()
    compiled = torch.compile(model)
    found = phb.doctor(compiled).coefficient
    assert abs(found.ratio - 1) < 1e-4
