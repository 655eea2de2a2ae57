"""Forwards that fail and logits that are not finite: nothing is left behind, and nothing of others is touched."""

import contextlib

import pytest
import torch
from charging import gradients, priced
from checks import assert_same
from tiny import tiny_batch
from torch.overrides import _get_current_function_mode_stack

import hf_phibalance as phb


@pytest.fixture(autouse=True)
def modes():
    """What a test that fails leaves behind is none of the next one's."""
    yield
    while _get_current_function_mode_stack():
        torch.overrides._pop_mode()


@contextlib.contextmanager
def broken(module, error, after):
    """`module` raises in its forward, before or after doing its work."""
    forward = module.forward

    def failing(*args, **kwargs):
        if after:
            forward(*args, **kwargs)
        raise error

    module.forward = failing
    yield
    module.forward = forward


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["gate", "experts", "self_attn"])
@pytest.mark.parametrize("model_type", ["mixtral", "dbrx"])
@pytest.mark.parametrize("announced", [False, True], ids=["implicit", "announced"])
def test_an_interrupted_forward_leaves_nothing_behind(model_type, where, error, announced):
    config = {"bias_coef": 0.3}
    model, reference = priced(model_type, config), priced(model_type, config)
    for one in (model, reference):  # a bias that matters
        gradients(one, tiny_batch(one, seed=5))
        phb.get_balancer(one).step()
    modules = dict((model.model.layers if model_type == "mixtral" else model.transformer.blocks)[1].named_modules())
    target = {
        "mixtral": {"gate": "mlp.gate", "experts": "mlp.experts", "self_attn": "self_attn"},
        "dbrx": {"gate": "ffn.router", "experts": "ffn.experts", "self_attn": "norm_attn_norm.attn"},
    }[model_type][where]
    balancer = phb.get_balancer(model)
    if announced:
        balancer.begin_step([tiny_batch(model)])
    with broken(modules[target], error, after=True), pytest.raises(type(error)):
        model(**tiny_batch(model))
    if isinstance(error, ValueError):
        assert _get_current_function_mode_stack() == []
    for seed in (1, 2):
        batch = tiny_batch(model, seed=seed)
        if announced:
            balancer.begin_step([batch])
        assert_same(gradients(model, batch), gradients(reference, batch))
        balancer.step()
        phb.get_balancer(reference).step()
    assert _get_current_function_mode_stack() == []
    assert_same(balancer.state_dict(), phb.get_balancer(reference).state_dict())
    assert_same(balancer.loads(), phb.get_balancer(reference).loads())


def test_modes_of_others_survive():
    """The stack of function modes is shared with `torch.device` contexts and users' own modes."""
    model = priced("mixtral", {"bias_coef": 0.3})
    expected = gradients(model, tiny_batch(model))
    phb.get_balancer(model).discard_step()
    gate = model.model.layers[1].mlp.gate

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def refuse(module, args):
        raise ValueError("a hook before ours")

    with Mode() as mode:
        assert_same(gradients(model, tiny_batch(model)), expected)
        phb.get_balancer(model).discard_step()
        model.zero_grad()
        handle = gate.register_forward_pre_hook(refuse, prepend=True)
        with pytest.raises(ValueError, match="a hook before ours"):
            model(**tiny_batch(model))
        handle.remove()
        assert _get_current_function_mode_stack() == [mode]
        with broken(gate, KeyboardInterrupt(), after=False), pytest.raises(KeyboardInterrupt):
            model(**tiny_batch(model))
        phb.get_balancer(model).discard_step()
        assert_same(gradients(model, tiny_batch(model)), expected)
        assert _get_current_function_mode_stack() == [mode]


def test_unpatching_after_ctrl_c_gives_back_the_operators():
    """Ctrl-C in a router runs no hook: its bias would act on every `topk` of so many scores, also of others."""
    model = priced("mixtral", {"bias_coef": 0.3})
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
    with broken(model.model.layers[1].mlp.gate, KeyboardInterrupt(), after=False), pytest.raises(KeyboardInterrupt):
        model(**tiny_batch(model))
    phb.unpatch(model)
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits_move_nothing(value, warned):
    model = priced("mixtral", {"bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    gradients(model, tiny_batch(model))
    balancer.step()
    balancer.check_finite()
    before, prices = balancer.state_dict(), balancer.prices()
    gate = model.model.layers[1].mlp.gate.weight
    good = gate.detach().clone()
    with torch.no_grad():
        gate[3, 0] = value
    gradients(model, tiny_batch(model))
    balancer.step()
    after = balancer.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in after if name != "steps")
    assert_same(balancer.prices(), prices)
    assert not warned.about("not finite")
    balancer.check_finite()
    assert len(warned.about("1 step(s) were not finite")) == 1
    with torch.no_grad():
        gate.copy_(good)
    gradients(model, tiny_batch(model))
    balancer.step()
    assert all(torch.isfinite(tensor).all() for tensor in balancer.state_dict().values())
    assert not torch.equal(balancer.means()["model.layers.0.mlp.gate"], before["layers.0.mlp.gate.mean_probs"])
