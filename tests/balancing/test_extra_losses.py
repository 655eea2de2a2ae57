"""The router z-loss and the sequence-wise loss: their gradients by formula, on top of any method."""

import math

import pytest
import torch
from charging import COEF
from references import EXTRAS, LOSSES, routers, select_with, sequence_loss, start_with
from steps import (
    CHECKPOINTING,
    EXTRA_COEF,
    FAMILIES,
    METHODS,
    added_gradient,
    assert_gradient,
    build,
    build_for,
    dealt,
    difference,
    loss_gradient,
    micro_batches,
    router_parameters,
    step_gradient,
)
from tiny import set_prices, tiny_batch

import hf_phibalance as phb
from hf_phibalance import PhiBalanceConfig


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_of_an_extra_loss(model_type, extra):
    batches = micro_batches(build(model_type))
    added = added_gradient(build(model_type), {"method": "none", extra: EXTRA_COEF[extra]}, batches)
    expected = loss_gradient(build(model_type), batches, [(EXTRA_COEF[extra], EXTRAS[extra])])
    assert_gradient(added, expected)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("extra", EXTRAS)
def test_extra_losses_do_not_depend_on_the_split(extra, checkpointing):
    """Nor on recomputation: whole sequences dealt to 3 and 6 micro-batches, against the formula of one."""
    whole = tiny_batch(build("mixtral"), 6, 10)
    expected = loss_gradient(build("mixtral"), [whole], [(EXTRA_COEF[extra], EXTRAS[extra])])
    for sizes in ((3, 1, 2), (1,) * 6):
        model = build("mixtral", checkpointing)
        config = {"coef": 0.0, extra: EXTRA_COEF[extra]}
        assert_gradient(added_gradient(model, config, list(dealt(whole, sizes))), expected)


@pytest.mark.parametrize("method", METHODS)
def test_extra_losses_come_on_top_of_any_method(method):
    model = build_for({"method": method}, "deepseek_v3")
    batches = micro_batches(model)
    strength = {"coef": COEF} if method in ("phi", *LOSSES) else {}
    gradients = []
    for extras in ({}, EXTRA_COEF):
        phb.patch(model, {"method": method, **strength, **extras})
        if method == "phi":
            set_prices(model)
        gradients.append(step_gradient(model, batches))
        phb.unpatch(model)
        start_with(model, torch.zeros(8))
    added = difference(*reversed(gradients))
    reference = build_for({"method": method}, "deepseek_v3")
    if method == "frozen":
        assert not set(router_parameters(model)) & set(gradients[1])
        for p in router_parameters(reference).values():
            p.requires_grad_(False)
    expected = loss_gradient(reference, batches, [(EXTRA_COEF[extra], EXTRAS[extra]) for extra in EXTRAS])
    assert_gradient(added, expected, parts=(False,) if method == "frozen" else (True, False))


def test_sequence_loss_takes_the_unbiased_choice():
    """A bias that sends every token to two experts does not change f."""
    model, naive = build("mixtral"), build("mixtral")
    batches = micro_batches(model)
    bias = torch.zeros(8)
    bias[:2] = 50.0
    for router in routers(naive).values():
        select_with(router, bias)
    gradients = []
    for config in ({"method": "loss_free"}, {"method": "loss_free", "sequence_coef": 2.0}):
        phb.patch(model, config)
        balancer = phb.get_balancer(model)
        balancer.set_biases(dict.fromkeys(balancer.layer_names, bias))
        gradients.append(step_gradient(model, batches))
        assert all(load[:2].sum() == load.sum() for load in balancer.loads().values())
        phb.unpatch(model)
    assert_gradient(difference(gradients[1], gradients[0]), loss_gradient(naive, batches, [(2.0, sequence_loss)]))


@pytest.mark.parametrize(
    "config", [{"method": "switch"}, *({"method": "none", name: 0.1} for name in EXTRAS)], ids=str
)
def test_a_loss_that_reaches_nothing_is_refused(config):
    model = build("mixtral")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.2.mlp.experts" in name)
    phb.patch(model, config)
    name = next((name for name in EXTRAS if name in config), "coef")
    with pytest.raises(ValueError, match=f"{name}=.*no gradient path leads from any router"):
        step_gradient(model, micro_batches(model))


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.1", True, None])
def test_extra_losses_refuse_what_is_no_strength(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        PhiBalanceConfig(**{name: value})
