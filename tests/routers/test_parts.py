"""Routers that see only some tokens (experts for images beside those for text) or none (a vision tower)."""

import pytest
import torch
from charging import COEF, collect
from checks import assert_same
from tiny import set_prices, tiny_model
from tiny_vlm import IMAGE_TEXT_TYPES, image_batch, tiny_image_model

import hf_phibalance as phb
from hf_phibalance.routers import find_routers, modality_of


pytestmark = pytest.mark.slow


TEXT, IMAGES = (None, None), ((24, 16), None)
TYPES = [t for t in ("ernie4_5_vl_moe", "dots3_note") if t in IMAGE_TEXT_TYPES]


def step(model, pictures, seed=0):
    balancer, batch = phb.get_balancer(model), image_batch(model, pictures, seed=seed)
    balancer.begin_step([batch])
    model(**batch).loss.backward()
    model.zero_grad()
    balancer.step()
    return balancer.metrics(per_layer=16)


def apart(values):
    """Splits `values` into those of routers for images and the others."""
    images = {name: value for name, value in values.items() if "vision" in name}
    return images, {name: value for name, value in values.items() if name not in images}


@pytest.mark.parametrize("model_type", TYPES)
def test_a_step_without_images_moves_no_router_for_images(model_type):
    model = phb.patch(tiny_image_model(model_type).train(), {"coef": 0.5, "bias_coef": 0.1})
    balancer = phb.get_balancer(model)
    uniform = balancer.means()
    first = step(model, TEXT)  # the first step also checks whether something bypasses a router
    images, text = apart(balancer.means())
    assert images and text and not any(value.isnan().any() for value in (*images.values(), *text.values()))
    assert_same(images, apart(uniform)[0])
    assert not any(torch.equal(text[name], uniform[name]) for name in text)
    assert first["max_vio"] > 0 and not [name for name in first if "vision" in name]
    without_images = balancer.figures()

    later = step(model, IMAGES, seed=1)
    moved, biases = apart(balancer.means())[0], apart(balancer.biases())[0]
    assert not any(torch.equal(moved[name], images[name]) for name in moved)
    assert later["vision/tokens"] > 0 and later["vision/max_vio"] > 0
    assert {name for name in later if "max_vio/" in name} == {
        f"{'vision/' if 'vision' in name else ''}max_vio/{name}" for name in balancer.layer_names
    }
    over_both = balancer.metrics(figures=without_images + balancer.figures())  # steps without images are no even steps
    assert over_both["vision/max_vio"] == later["vision/max_vio"]
    assert over_both["max_vio"] == pytest.approx((first["max_vio"] + later["max_vio"]) / 2)
    step(model, TEXT, seed=2)
    assert_same(apart(balancer.means())[0], moved)
    assert_same(apart(balancer.biases())[0], biases)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_checkpointing_charges_the_same(model_type, reentrant):
    model = phb.patch(tiny_image_model(model_type).train(), {"coef": COEF})
    set_prices(model)

    def gradients():
        batches = [image_batch(model, pictures, seed=i) for i, pictures in enumerate((IMAGES, TEXT))]
        model.zero_grad()
        phb.get_balancer(model).begin_step(batches)
        for batch in batches:
            model(**batch).loss.backward()
        loads = phb.get_balancer(model).now.counts.load.clone()
        phb.get_balancer(model).discard_step()
        return {**collect(model), "loads": loads}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # otherwise the tower gets no gradient, because its inputs need none
        model.enable_input_require_grads()
    again = gradients()
    towers = [name for name in plain if "vision_tower" in name or "visual" in name] if reentrant else []
    for name in plain.keys() - set(towers):
        torch.testing.assert_close(again[name], plain[name], rtol=1e-4, atol=1e-5)


def test_the_doctor_measures_the_declared_coefficient():
    model = phb.patch(tiny_image_model("ernie4_5_vl_moe").train(), {"coef": 0.01})
    batches = [image_batch(model, pictures, seed=i) for i, pictures in enumerate((IMAGES, TEXT))]
    report = phb.doctor(model, batches)
    assert not report.problems, report
    assert report.coefficient.ratio == pytest.approx(1, abs=1e-3)
    assert {name for name in report.coefficient.by_router if "vision" in name}
    assert all(ratio == pytest.approx(1, abs=1e-3) for ratio in report.coefficient.by_router.values())
    made = phb.doctor(model)  # on generated tokens, without image placeholders
    assert not made.problems and "nothing to route" in str(made)


@pytest.mark.parametrize(
    "config", [{"method": "pooled", "coef": 0.1}, {"sequence_coef": 0.1}], ids=["pooled", "sequence"]
)
def test_what_needs_whole_sequences_is_refused(config):
    with pytest.raises(ValueError, match=r"sees only a part"):
        phb.patch(tiny_image_model("ernie4_5_vl_moe"), config)


@pytest.mark.parametrize("method", ["switch", "global_batch", "quantile"])
def test_other_methods_see_the_part_alone(method):
    model = phb.patch(tiny_image_model("ernie4_5_vl_moe").train(), {"method": method})
    step(model, TEXT)
    step(model, IMAGES, seed=1)
    assert all(load.sum() > 0 for load in phb.get_balancer(model).loads().values())


def test_more_vectors_than_input_ids_are_refused():
    """A model that inserts images itself, so its batches do not show what it routes."""
    model = phb.patch(tiny_image_model("qwen3_vl_moe").train())
    language_model = model.model.language_model

    def widen(module, args, kwargs):
        embeds = kwargs["inputs_embeds"]
        wide = torch.cat([embeds[:, :1], embeds], 1)
        ids = kwargs["position_ids"]
        ids = None if ids is None else torch.cat([ids[..., :1], ids], -1)
        return args, {**kwargs, "inputs_embeds": wide, "attention_mask": None, "position_ids": ids}

    language_model.register_forward_pre_hook(widen, with_kwargs=True)
    with pytest.raises(ValueError, match="placeholder for each vector of an image"):
        model(**image_batch(model, (None,)))


def test_names_tell_what_a_router_is_for():
    assert [
        modality_of(n) for n in ("model.visual.blocks.3.mlp.gate", "a.vision_tower.0.gate", "x.mlp.vision_moe.gate")
    ] == ["vision"] * 3
    assert modality_of("audio_tower.layers.0.mlp.gate") == "audio"
    assert all(site.sees_all for site in find_routers(tiny_model("mixtral")))
