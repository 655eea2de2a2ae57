"""From one method to another, and out again: biases in force are kept, memories do not leak, no trace is left."""

import itertools

import pytest
import torch
from charging import COEF
from checks import assert_same
from references import start_with
from steps import EXTRA_COEF, FAMILIES, METHODS, build, build_for, micro_batches, step_gradient
from tiny import set_prices

import hf_phibalance as phb


pytestmark = pytest.mark.slow


def trace(model):
    hooks = [
        [type(hook).__name__ for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        for m in model.modules()
    ]
    return (
        hooks,
        set(vars(model)),
        model.config.to_dict(),
        {name: p.requires_grad for name, p in model.named_parameters()},
        [set(vars(m)) for m in model.modules()],
        list(model.state_dict()),
    )


@pytest.mark.parametrize(
    ("method", "model_type"),
    [*zip(METHODS, itertools.cycle(FAMILIES)), ("loss_free", "deepseek_v3"), ("quantile", "deepseek_v3")],
)
def test_unpatch_leaves_no_trace(method, model_type):
    model = build_for({"method": method}, model_type)
    batches = micro_batches(model)
    plain, before = step_gradient(model, batches), trace(model)
    phb.patch(model, {"method": method, **EXTRA_COEF})
    step_gradient(model, batches)
    assert trace(model) != before
    phb.unpatch(model)
    start_with(model, torch.zeros(8))  # a native bias stays as trained
    assert trace(model) == before
    assert_same(step_gradient(model, batches), plain)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_another_method_goes_on_from_the_bias_in_force(model_type):
    """The weights were trained with that selection; methods without a bias of their own neither move nor lose it."""
    model = build(model_type)
    batches = micro_batches(model)
    phb.patch(model, {"coef": 0.0, "bias_coef": 0.05})
    step_gradient(model, batches)
    biases = phb.get_balancer(model).biases()
    assert all(bias.abs().max() > 2e-3 for bias in biases.values())
    phb.patch(model, {"method": "loss_free", "bias_coef": 0.001})
    assert_same(phb.get_balancer(model).biases(), biases)
    step_gradient(model, batches)
    for name, bias in phb.get_balancer(model).biases().items():
        assert 0 < (bias - biases[name]).abs().max() < 0.0011
    moved = phb.get_balancer(model).biases()
    for config in ({"method": "switch"}, {"method": "none"}, {"method": "global_batch"}, {"coef": 0.1}):
        phb.patch(model, config)
        assert_same(phb.get_balancer(model).biases(), moved)
        step_gradient(model, batches)
        assert_same(phb.get_balancer(model).biases(), moved)


@pytest.mark.parametrize("method", ["switch", "pooled", "global_batch"])
def test_a_loss_without_memory_is_the_same_after_another_method(method):
    model = build("mixtral")
    batches = micro_batches(model)
    phb.patch(model, {"method": method, "coef": COEF})
    fresh = step_gradient(model, batches)
    phb.unpatch(model)
    phb.patch(model, {"coef": COEF, "track": "load"})
    set_prices(model)
    phb.patch(model, {"method": method, "coef": COEF})
    assert_same(step_gradient(model, batches), fresh)


@pytest.mark.parametrize("method", METHODS)
def test_phi_after_another_method_has_its_means(method):
    """Whatever the method, both means are kept, and the prices of the next one come from them."""
    model = build("mixtral")
    phb.patch(model, {"method": method})
    step_gradient(model, micro_batches(model))
    before = phb.get_balancer(model).means("probs")
    phb.patch(model, {"coef": COEF})
    for name, mean in phb.get_balancer(model).means().items():
        torch.testing.assert_close(mean.sum(), torch.tensor(1.0))
        assert torch.equal(mean, before[name])
    step_gradient(model, micro_batches(model, seed=10))
    assert all(torch.isfinite(price).all() and price.any() for price in phb.get_balancer(model).prices().values())
