"""Loads, prices, figures and saved state belong to the layer that their name says."""

import copy

import pytest
import torch
from checks import assert_same
from references import forward, naive_figures
from safetensors.torch import load_file
from steps import build, step_gradient
from tiny import tiny_batch
from tiny_vlm import IMAGE_TEXT_TYPES, image_batch, tiny_image_model

import hf_phibalance as phb


pytestmark = pytest.mark.slow


LAYERS = 12  # so that sorting the names would put layers 10 and 11 before layer 2


def deep(**config):
    """A patched Mixtral of 12 layers, a batch, and what each router of the unpatched model does with that batch."""
    model = build("mixtral", num_hidden_layers=LAYERS)
    batch = tiny_batch(model, 4, 12)
    with torch.no_grad():
        _, routed = forward(model, batch)
    return phb.patch(model, {"coef": 1.0, "ema_rate": 1.0, **config}), batch, routed


def log_price(share):
    """The gradient of the negative entropy at the relative load, centred."""
    price = (len(share) * share).log()
    return (price - price.mean()).float()


def test_more_than_ten_layers_keep_their_names(tmp_path):
    model, batch, routed = deep()
    balancer = phb.get_balancer(model)
    assert balancer.layer_names == list(routed) and len(routed) == LAYERS
    step_gradient(model, [batch])
    biases = {name: torch.linspace(0, 0.1 * i, 8) for i, name in enumerate(routed)}
    balancer.set_biases(biases)
    assert_same(balancer.biases(), biases)
    saved = load_file(balancer.save(tmp_path))
    for name, router in routed.items():
        assert balancer.loads()[name].tolist() == router.counts.tolist()
        torch.testing.assert_close(balancer.prices()[name], log_price(router.mean_probs()), rtol=1e-4, atol=1e-5)
        for state in (saved, balancer.state_dict()):
            mean = state[f"{name.removeprefix('model.')}.mean_probs"]
            torch.testing.assert_close(mean, router.mean_probs().float(), rtol=1e-4, atol=1e-6)
            assert torch.equal(state[f"{name.removeprefix('model.')}.bias"], biases[name])
    twin = deep()[0]
    other = phb.get_balancer(twin)
    other.load(tmp_path)
    assert_same(other.prices(), balancer.prices())
    assert_same(other.biases(), biases)


def test_each_of_more_than_ten_layers_selects_with_its_own_bias():
    model, batch, _ = deep()
    balancer = phb.get_balancer(model)
    favourites = {name: (i + i // 8) % 8 for i, name in enumerate(balancer.layer_names)}
    balancer.set_biases({name: 9 * torch.eye(8)[expert] for name, expert in favourites.items()})
    step_gradient(model, [batch])
    for name, expert in favourites.items():
        assert balancer.loads()[name][expert] == batch["attention_mask"].sum(), name


@pytest.mark.parametrize("per_layer", [3, 5])
def test_a_figure_is_that_of_its_layer_where_not_all_are_shown(per_layer):
    model, batch, routed = deep()
    balancer = phb.get_balancer(model)
    step_gradient(model, [batch])
    expected = naive_figures({name: router.counts.tolist() for name, router in routed.items()})
    of_layers = {name: value for name, value in expected.items() if "/" in name}
    assert len(set(of_layers.values())) > LAYERS / 2  # else a wrong layer could have the right figure
    metrics = balancer.metrics(per_layer)
    shown = [name for name in metrics if name.startswith("max_vio/")]
    assert len(shown) == per_layer and set(shown) <= set(of_layers)
    for name in [*shown, *(expected.keys() - of_layers.keys())]:
        assert metrics[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


@pytest.mark.skipif("ernie4_5_vl_moe" not in IMAGE_TEXT_TYPES, reason="needs a transformers that has ernie4_5_vl_moe")
@pytest.mark.parametrize("second", [False, True], ids=["one image router a layer", "two in the first layer"])
def test_an_image_token_counts_once_however_many_routers_see_it(second):
    model = tiny_image_model("ernie4_5_vl_moe").train()
    if second:
        block = next(module for name, module in model.named_modules() if name.endswith("vision_moe"))
        block.second = copy.deepcopy(block)
        block.register_forward_hook(lambda module, args, out: (out[0] + module.second(*args)[0], out[1]))
    balancer = phb.get_balancer(phb.patch(model, {"coef": 0.5}))
    assert sum("vision" in name for name in balancer.layer_names) == (3 if second else 2)
    batch = image_batch(model, ((24, 16), None))
    step_gradient(model, [batch])
    images = int((batch["mm_token_type_ids" if "mm_token_type_ids" in batch else "moe_mm_token_type_ids"] != 0).sum())
    metrics = balancer.metrics()
    assert metrics["vision/tokens"] == images > 0
    assert metrics["tokens"] == batch["attention_mask"].sum() > images
