"""What a family brings itself: its selection bias, which is moved in place, and its auxiliary loss, which is off meanwhile."""

import copy

import pytest
import torch
from checks import ours
from steps import build, step_gradient
from tiny import tiny_batch, tiny_model
from tiny_vlm import IMAGE_TEXT_TYPES, image_batch, tiny_image_model
from trained import logits_of

import hf_phibalance as phb


pytestmark = pytest.mark.slow


WITH_OWN_BIAS = ["deepseek_v3", "minimax_m2"]  # in the router, and in the block around it
LOSS_ON = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def own_biases(model, names):
    """The family's own bias `(E,)` by the name of its router."""
    buffers = dict(model.named_buffers())
    owners = {name: (name, name.rpartition(".")[0]) for name in names}
    keys = {name: [f"{owner}.e_score_correction_bias" for owner in pair] for name, pair in owners.items()}
    return {name: next(buffers[key] for key in pair if key in buffers) for name, pair in keys.items()}


# ---------------------------------------------------------------------- the bias


@pytest.mark.parametrize("model_type", WITH_OWN_BIAS)
def test_small_steps_of_a_bias_in_bf16_add_up(model_type):
    """Around 1 bfloat16 has steps of 0.004 and 0.008: while it moves, the bias is kept in float32."""
    model, rate = build(model_type), 3e-4
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = torch.ones_like(buffer, dtype=torch.bfloat16)
    phb.patch(model, {"method": "loss_free", "bias_coef": rate})
    balancer, batch = phb.get_balancer(model), tiny_batch(model, 4, 12)
    expected = {name: torch.ones(8, dtype=torch.float64) for name in balancer.layer_names}
    for _ in range(10):
        step_gradient(model, [batch])
        for name, load in balancer.loads().items():
            expected[name] += rate * (load.mean() - load).sign().double()
            torch.testing.assert_close(balancer.biases()[name].double(), expected[name], rtol=0, atol=1e-6)
    for name, bias in own_biases(model, expected).items():
        assert bias.dtype == torch.float32 and (bias < 1).any()
        torch.testing.assert_close(bias.double(), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [{"coef": 0.1}, {"bias_coef": 0.1}], ids=["coef", "bias_coef"])
@pytest.mark.parametrize("model_type", WITH_OWN_BIAS)
def test_set_biases_sets_the_bias_of_the_family(model_type, config):
    model, plain = phb.patch(tiny_model(model_type), config), tiny_model(model_type)
    unbiased, balancer = logits_of(plain), phb.get_balancer(model)
    generator = torch.Generator().manual_seed(0)
    biases = {name: torch.rand(8, generator=generator) for name in balancer.layer_names}
    balancer.set_biases(biases)
    for name, bias in own_biases(plain, biases).items():
        bias.copy_(biases[name])
        assert torch.equal(balancer.biases()[name], biases[name])
    assert torch.equal(logits_of(model), logits_of(plain)) and not torch.equal(logits_of(plain), unbiased)
    phb.unpatch(model)  # which leaves the bias of the family as it is
    assert torch.equal(logits_of(model), logits_of(plain))


# ---------------------------------------------------------------------- the loss


@torch.no_grad()
@pytest.mark.parametrize("model_type", [t for t in ("qwen3_vl_moe", "ernie4_5_vl_moe") if t in IMAGE_TEXT_TYPES])
def test_the_loss_of_a_vision_language_model_is_off_while_patched(model_type):
    """Its switch and its coefficient are in `text_config`."""
    model, without = tiny_image_model(model_type, **LOSS_ON), tiny_image_model(model_type)
    batch, first = image_batch(model, (None, None)), model.config.to_dict()
    expected, own = float(without(**batch).loss), float(model(**batch).loss)
    assert own > expected + 0.1
    phb.patch(model, {"coef": 0.1})
    assert float(model(**batch).loss) == expected
    assert not model.config.text_config.output_router_logits
    phb.unpatch(model)
    assert float(model(**batch).loss) == own
    assert model.config.to_dict() == first


@pytest.mark.parametrize("coef", [0.1, 0.2], ids=["the same configuration", "another one"])
def test_unpatch_restores_what_was_there_before_the_first_patch(coef):
    """Between two patches somebody, for instance a trainer, switches the loss on again with another coefficient."""
    model = tiny_model("mixtral", **LOSS_ON)
    model.config.phi_balance = {"coef": 0.3}  # of the run that this checkpoint comes from
    first, attributes = copy.deepcopy(model.config.to_dict()), dict(vars(model))
    phb.patch(model, {"coef": 0.1})
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.9
    phb.patch(model, {"coef": coef})
    assert model.config.router_aux_loss_coef == model.router_aux_loss_coef == 0
    assert not model.config.output_router_logits
    phb.unpatch(model)
    assert model.config.to_dict() == first
    assert vars(model).keys() == attributes.keys() and model.router_aux_loss_coef == 0.5
    assert not ours(model)
