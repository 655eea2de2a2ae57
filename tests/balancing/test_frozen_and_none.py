"""The two methods without a lever: `"frozen"` stops the routers and nothing else, `"none"` only counts."""

import pytest
import torch
from checks import assert_same
from peft import get_peft_model
from references import forward
from steps import FAMILIES, build, micro_batches, router_parameters, step_gradient

import hf_phibalance as phb


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_frozen_routers_get_no_gradient_and_the_rest_its_own(model_type):
    model = build(model_type)
    batches = micro_batches(model)
    plain = step_gradient(model, batches)
    phb.patch(model, {"method": "frozen"})
    frozen = step_gradient(model, batches)
    names = set(router_parameters(model))
    assert names and not names & set(frozen)
    assert_same(frozen, {name: grad for name, grad in plain.items() if name not in names})
    assert phb.get_balancer(model).steps == 1 and all(
        load.sum() > 0 for load in phb.get_balancer(model).loads().values()
    )
    phb.unpatch(model)
    assert_same(step_gradient(model, batches), plain)


def test_unpatch_restores_what_was_frozen_before():
    model = build("mixtral")
    params = list(router_parameters(model).values())
    params[0].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for config in ({"method": "frozen"}, {"method": "none"}, {"method": "frozen"}):
        phb.patch(model, config)
        expected = [False] * len(params) if config["method"] == "frozen" else [False] + [True] * (len(params) - 1)
        assert [p.requires_grad for p in params] == expected
    phb.unpatch(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("ended", [False, True], ids=["adapter", "unloaded"])
def test_unpatch_does_not_train_what_an_adapter_has_frozen_since(ended):
    model = phb.patch(build("mixtral"), {"method": "frozen"})
    wrapped = get_peft_model(model, phb.lora_config(model, targets="attention"))
    wrapped = phb.unpatch(wrapped.unload() if ended else wrapped)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained) and bool(trained) is not ended


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
def test_none_only_counts(model_type):
    model = build(model_type)
    batches = micro_batches(model)

    def losses_and_gradients():
        losses = [model(**batch).loss.detach() for batch in batches]
        return losses, step_gradient(model, batches)

    losses, plain = losses_and_gradients()
    routed = [forward(model, batch)[1] for batch in batches]
    phb.patch(model, {"method": "none"})
    again, gradient = losses_and_gradients()
    assert all(torch.equal(*pair) for pair in zip(losses, again))
    assert_same(gradient, plain)
    balancer = phb.get_balancer(model)
    for name, load in balancer.loads().items():
        assert load.tolist() == sum(r[name].counts for r in routed).tolist()
    assert not any(bias.any() for bias in balancer.biases().values())
