"""`lora_config` over all families: PEFT accepts it, and exactly what it promises learns."""

import re

import pytest
import torch
from peft import get_peft_model
from tiny import MODEL_TYPES, set_prices, tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.routers import find_routers


COEF = 2.0
BALANCED = [model_type for model_type in MODEL_TYPES if model_type != "doge"]
# what no adapter can reach, with the module that reads the weights of another
OUT_OF_REACH = {("dbrx", "experts"): "DbrxExperts", ("longcat_flash", "router"): "LongcatFlashTopkRouter"}
WRAPPER = re.compile(r"base_model\.model\.|base_layer\.|modules_to_save\.default\.|\.default\b")


def adapted(model, **policy):
    """`model`, patched and with adapters that already do something."""
    model = get_peft_model(model, phb.lora_config(model, **policy))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    phb.patch(model.train(), {"coef": COEF})
    set_prices(model)
    return model


def learning(model):
    """Names of the weights, as in the plain model, that learn; those of an adapter as `lora ...`."""
    names = {WRAPPER.sub("", name) for name, p in model.named_parameters() if p.requires_grad}
    return {f"lora {name.partition('.lora_')[0]}" if ".lora_" in name else name for name in names}


def adapts(learning, parameter):
    """Whether the matrix `parameter` has an adapter: the wrappers of the parameters of one module are nested."""
    return f"lora {parameter.rpartition('.')[0]}" in learning


def matrices(model, pattern):
    """Names of the matrices (one, or one per expert) of `model` that match `pattern`."""
    return [n for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("bias") and re.search(pattern, n)]


def router_matrices(model):
    return [name for site in find_routers(model) for name in matrices(model, rf"^{re.escape(site.name)}\.")]


def assert_all_learn(model):
    """Every trainable parameter gets a gradient from one step of task and prices."""
    model(**tiny_batch(model, batch=4, seq=16)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
    phb.get_balancer(model).step()


@pytest.mark.parametrize("model_type", BALANCED)
def test_lora_on_everything(model_type):
    plain = tiny_model(model_type)
    routers, experts = router_matrices(plain), matrices(plain, r"experts\.(gate_up|gate|up|down)_proj$")
    attention = matrices(
        plain, r"attn\.(\d\.)?([qkvo]_proj|q_[ab]_proj|Wqkv)\.weight$|self_attention\.kv_proj\.weight$"
    )
    shared = matrices(plain, r"(shared_experts?|shared_mlp)\.(gate_proj|up_proj|down_proj)\.weight$")
    outside = {"targets": None}
    if (model_type, "experts") in OUT_OF_REACH:
        outside, experts = {"targets": "attention"}, []
    policy = "lora"
    if (model_type, "router") in OUT_OF_REACH:
        policy, routers = "frozen", []
    model = adapted(plain, router=policy, **outside)
    names = learning(model)
    assert attention or model_type == "nemotron_h"
    for name in [*routers, *experts, *attention, *shared]:
        assert adapts(names, name), name
    assert not [
        name
        for name in names
        if re.search(r"layernorm|\bnorm\.|embed|lm_head|vision|\bindexer|shared_expert_gate", name)
    ]
    assert all(name.startswith("lora ") for name in names)
    assert_all_learn(model)


@pytest.mark.parametrize("model_type", BALANCED)
def test_full_routers_beside_the_experts_or_attention(model_type):
    """One of the two, in turn, so that every family has one and every kind has many."""
    targets = "attention" if (model_type, "experts") in OUT_OF_REACH or len(model_type) % 2 else "experts"
    plain = tiny_model(model_type)
    routers = {name for site in find_routers(plain) for name in matrices(plain, rf"^{re.escape(site.name)}\.")}
    attention = matrices(plain, r"self_attn\.([qkvo]_proj|q_[ab]_proj)\.weight$")
    experts = matrices(plain, r"experts\.(gate_up|gate|up|down)_proj$")
    model = adapted(plain, router="full", targets=targets)
    names = learning(model)
    assert routers <= names
    for name in attention:
        assert adapts(names, name) == (targets == "attention"), name
    for name in experts:
        assert adapts(names, name) == (targets == "experts"), name
    assert_all_learn(model)
