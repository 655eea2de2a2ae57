"""`patch` and `unpatch`: again, anew, and what is refused; a refused patch leaves the model as it was."""

import pytest
import torch
import transformers
from charging import COEF, assert_charged_as_defined, gradients, priced
from checks import assert_same, ours
from tiny import set_prices, tiny_batch, tiny_model
from torch import nn

import hf_phibalance as phb


def test_unpatch_twice_and_on_a_model_that_was_never_patched():
    model = tiny_model("mixtral")
    attributes, config = dict(vars(model)), model.config.to_dict()
    assert phb.unpatch(model) is model and vars(model) == attributes
    phb.patch(model, {"coef": COEF, "token_mask": "labels"})
    assert phb.unpatch(model) is model and phb.unpatch(model) is model
    assert vars(model).keys() == attributes.keys() and model.config.to_dict() == config
    assert "forward" not in vars(model) and not ours(model)


def test_patching_twice_is_the_same_as_once():
    model, twice = priced(), priced()
    phb.patch(phb.patch(twice), {"coef": COEF})
    assert len(ours(twice)) == len(ours(model))
    assert_same(gradients(twice, tiny_batch(model)), gradients(model, tiny_batch(model)))


def test_patch_with_a_new_config_keeps_the_duals():
    model = priced("mixtral", {"bias_coef": 0.1})
    gradients(model, tiny_batch(model))
    balancer = phb.get_balancer(model)
    balancer.step()
    before, prices = balancer.state_dict(), balancer.prices()
    phb.patch(model, {"coef": 0.25, "bias_coef": 0.2, "ema_rate": 0.9, "potential": "log_cosh"})
    changed = phb.get_balancer(model)
    assert (
        changed is balancer
        and changed.config.coef == 0.25
        and len(ours(model)) == len(ours(priced("mixtral", {"bias_coef": 0.1})))
    )
    assert_same(changed.state_dict(), before)
    assert not any(torch.equal(price, prices[name]) for name, price in changed.prices().items())
    assert model.config.phi_balance == changed.config.to_dict()
    phb.unpatch(model)
    assert not hasattr(model.config, "phi_balance")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("mixtral", {"coef": -1.0}, "coef"),
        ("mixtral", {"coef": 1.0, "from_the_future": 1, "version": "99.0"}, "from_the_future.*99.0.*Upgrade"),
        ("mixtral", {"potential": "shannon"}, "potential"),
        ("mixtral", "yes", "PhiBalanceConfig"),
        ("mixtral", False, "`config` is False.*phb.unpatch"),
        ("phimoe", {"bias_coef": 0.1}, "bias_coef=0.1 is not possible.*sparsemixer.*Set bias_coef=0"),
        ("doge", {}, "product keys"),
    ],
)
@pytest.mark.parametrize("already", [False, True], ids=["plain", "patched"])
def test_a_refused_patch_leaves_the_model_as_it_was(model_type, config, message, already):
    if already and model_type == "doge":
        pytest.skip("cannot be patched at all")
    model = priced(model_type) if already else tiny_model(model_type)
    attributes, hooks, written = dict(vars(model)), ours(model), model.config.to_dict()
    state = phb.get_balancer(model).state_dict() if already else {}
    with pytest.raises(ValueError, match=message):
        phb.patch(model, config)
    assert vars(model) == attributes and ours(model) == hooks and model.config.to_dict() == written
    if already:
        assert_same(phb.get_balancer(model).state_dict(), state)


def test_a_model_without_routers_is_refused():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no router.*supported_families"):
        phb.patch(model, True)
    assert not hasattr(model.config, "phi_balance")


def test_use_kernels_is_refused(monkeypatch):
    model = tiny_model("gpt_oss")
    attributes = dict(vars(model))
    monkeypatch.setattr(type(model.model.layers[0].mlp), "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    phb.unpatch(phb.patch(model, {}))  # the kernel is not in use
    model._use_kernels = True
    with pytest.raises(ValueError, match=r"MegaBlocksMoeMLP.*model.layers.0.mlp.router.*use_kernels=False"):
        phb.patch(model, {})
    del model._use_kernels
    assert vars(model) == attributes and not ours(model)


def test_a_bypassed_router_is_refused_at_the_first_step():
    model = priced()
    block = model.model.layers[1].mlp
    block.forward = lambda hidden: block.experts(
        hidden.reshape(-1, 32), torch.zeros(16, 2, dtype=torch.long), torch.ones(16, 2)
    ).view_as(hidden)
    before = phb.get_balancer(model).state_dict()
    gradients(model, tiny_batch(model))
    with pytest.raises(ValueError, match=r"1 of 3 patched routers were never called.*model.layers.1.mlp.gate"):
        phb.get_balancer(model).step()
    assert_same(phb.get_balancer(model).state_dict(), before)


# ---------------------------------------------------------------------- layers that differ


def pruned(model, layer, experts):
    """A Mixtral without the last experts of one layer."""
    block = model.model.layers[layer].mlp
    for owner, name in ((block.gate, "weight"), (block.experts, "gate_up_proj"), (block.experts, "down_proj")):
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach()[:experts].clone()))
    for owner in (block.gate, block.experts):
        owner.num_experts = experts
    return model


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_routers_with_different_numbers_of_experts(layer, tmp_path):
    config = {"coef": COEF, "bias_coef": 0.2, "ema_rate": 0.5}
    model = phb.patch(pruned(tiny_model("mixtral").train(), layer, 5), config)
    balancer = set_prices(model)
    sizes = [5 if i == layer else 8 for i in range(3)]
    assert [len(price) for price in balancer.prices().values()] == sizes
    assert_charged_as_defined(model, tiny_batch(model))
    balancer = phb.get_balancer(phb.patch(model, config))
    start = balancer.means("load")
    gradients(model, tiny_batch(model))
    balancer.step()
    for name, load in balancer.loads().items():
        assert load.sum() == 2 * tiny_batch(model)["attention_mask"].sum()
        mean = 0.5 * start[name] + 0.5 * load / load.sum()
        torch.testing.assert_close(balancer.means("load")[name], mean)
        price = (len(load) * mean).log()
        torch.testing.assert_close(balancer.biases()[name], -0.2 * (price - price.mean()), rtol=1e-4, atol=1e-6)
    assert all(torch.isfinite(torch.tensor(value)) for value in balancer.metrics().values())
    balancer.save(tmp_path)
    other = phb.patch(pruned(tiny_model("mixtral"), layer, 5), config)
    phb.get_balancer(other).load(tmp_path)
    assert_same(phb.get_balancer(other).state_dict(), balancer.state_dict())
    whole = phb.patch(tiny_model("mixtral"), config)
    with pytest.raises(ValueError, match="another model"):
        phb.get_balancer(whole).load(tmp_path)


def test_pruned_after_patching_is_refused():
    model = priced()
    pruned(model, 1, 5)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.gate.*\(16, 5\).*\(16, 8\).*atch"):
        model(**tiny_batch(model))
    phb.patch(phb.unpatch(model), {"coef": COEF})
    gradients(model, tiny_batch(model))
    phb.get_balancer(model).step()
