"""Copies and pickles of a patched model: each has a balancer of its own and goes on as the original would have."""

import copy

import pytest
import torch
from charging import gradients, priced
from checks import assert_same, ours, rebuilt
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("token_mask", ["attention", "labels"])
def test_a_copy_has_a_balancer_of_its_own(how, model_type, token_mask, tmp_path):
    config = {"bias_coef": 0.1, "token_mask": token_mask}
    model, twin = priced(model_type, config), priced(model_type, config)
    for one in (model, twin):
        gradients(one, tiny_batch(one))
        phb.get_balancer(one).step()
    other = rebuilt(model, how)
    balancer = phb.get_balancer(other)
    assert balancer is not phb.get_balancer(model) and balancer.root is other
    assert len(ours(other)) == len(ours(model)) and all(hook.reader is balancer.forwards for hook in ours(other))
    before = phb.get_balancer(model).state_dict()
    for seed in (3, 4):  # goes on as the original would have
        assert_same(gradients(other, tiny_batch(other, seed=seed)), gradients(twin, tiny_batch(twin, seed=seed)))
        balancer.step()
        phb.get_balancer(twin).step()
    assert_same(balancer.state_dict(), phb.get_balancer(twin).state_dict())
    assert_same(phb.get_balancer(model).state_dict(), before)
    for site in phb.get_balancer(model).sites:
        if site.native_bias:
            assert torch.equal(site.read_native_bias(), before[f"{site.name.removeprefix('model.')}.bias"])

    other.eval().save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same(phb.get_balancer(loaded).state_dict(), balancer.state_dict())

    phb.unpatch(other)
    plain = tiny_model(model_type)
    assert vars(other).keys() == vars(plain).keys() and not ours(other)
    assert other.config.to_dict().keys() == plain.config.to_dict().keys()
    assert phb.get_balancer(model) is not None and len(ours(model)) > 0


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_model_built_on_meta_gets_fresh_duals(where):
    plain = tiny_model("mixtral")
    with torch.device("meta"):
        model = type(plain)(plain.config)
        if where == "inside":
            phb.patch(model)
    values = phb.get_balancer(phb.patch(model).to_empty(device="cpu")).duals.values
    assert torch.equal(values, phb.get_balancer(phb.patch(plain)).duals.values)


def test_copy_of_a_model_in_the_middle_of_a_step():
    model = priced()
    phb.get_balancer(model).begin_step([tiny_batch(model)] * 2)
    output = model(**tiny_batch(model))
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        reference(**tiny_batch(model))
    output.loss.backward()
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    assert phb.get_balancer(model).metrics()["tokens"] == 2 * tiny_batch(model)["attention_mask"].sum()
    phb.get_balancer(reference).step()
    assert phb.get_balancer(reference).steps == 0
