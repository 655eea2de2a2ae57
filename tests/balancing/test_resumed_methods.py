"""Every method goes on bitwise the same after its state was saved and loaded."""

import pytest
import torch
from checks import assert_same
from steps import EXTRA_COEF, METHODS, SHAPES, build, build_for, micro_batches, step_gradient

import hf_phibalance as phb


RUNS = {
    **{method: {"method": method} for method in METHODS},
    "phi_global": {"price_from": "global", "bias_coef": 0.02},
    "phi_hard": {"price_from": "current", "track": "load"},
    "switch_and_bias": {"method": "switch", "bias_coef": 0.02},
    "quantile_averaged": {"method": "quantile", "bias_coef": 0.3},
}


def train(model, steps, start=0, lr=0.05):
    for step in range(start, start + steps):
        step_gradient(model, micro_batches(model, SHAPES[:2], seed=100 * step))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= lr * p.grad


@pytest.mark.parametrize(
    ("model_type", "run"),
    [("mixtral", run) for run in RUNS] + [("deepseek_v3", run) for run in ("loss_free", "quantile", "phi_global")],
)
def test_resumed_training_is_bitwise_the_same(model_type, run, tmp_path):
    config = {**RUNS[run], **EXTRA_COEF}
    straight = phb.patch(build_for(config, model_type), config)
    train(straight, 2)
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    phb.get_balancer(straight).save(tmp_path)
    train(straight, 2, start=2)
    resumed = phb.patch(build_for(config, model_type, seed=1), config)
    resumed.load_state_dict(weights)
    phb.get_balancer(resumed).load(tmp_path)
    train(resumed, 2, start=2)
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))
    assert_same(phb.get_balancer(resumed).state_dict(), phb.get_balancer(straight).state_dict())
    assert phb.get_balancer(resumed).steps == 4


@pytest.mark.parametrize("method", ["pooled", "quantile", "frozen"])
def test_a_saved_model_comes_back_with_its_method(method, tmp_path):
    model = phb.patch(build("mixtral"), {"method": method, **EXTRA_COEF})
    batches = micro_batches(model)
    step_gradient(model, batches)
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=True).train()
    assert phb.get_balancer(loaded).config == phb.get_balancer(model).config
    assert_same(phb.get_balancer(loaded).state_dict(), phb.get_balancer(model).state_dict())
    assert_same(step_gradient(loaded, batches), step_gradient(model, batches))
