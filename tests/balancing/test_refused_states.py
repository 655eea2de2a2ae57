"""Sidecars that are damaged, foreign, changed, or of another version: refused with a remedy, the model untouched."""

import json
import os
import random

import pytest
import torch
from checks import assert_same, is_patched
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from trained import BIAS, GRADIENT, duals, logits_of, trained

import hf_phibalance as phb
from hf_phibalance.balancing.state import checksum
from hf_phibalance.files import STATE_NAME


NAME = "layers.1.mlp.gate"


def rewrite(path, change=lambda state: None, headers=lambda header: None, sign=True):
    """Applies `change` to the tensors and `headers` to the header of a sidecar; with `sign`, its checksum is that of the result."""
    state = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    change(state)
    headers(header)
    if sign and "checksum" in header:
        header["checksum"] = checksum(state, header)
    save_file(state, path, metadata=header)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved, patched Mixtral, and its sidecar as bytes."""
    folder = tmp_path_factory.mktemp("saved")
    trained("mixtral", BIAS).save_pretrained(folder)
    return folder, (folder / STATE_NAME).read_bytes()


def refused(model, path, remedy):
    """`path` is refused by `balancer.load` with `remedy` in the message, and the model is as before."""
    balancer = phb.get_balancer(model)
    before, logits = duals(model), logits_of(model)
    with pytest.raises(ValueError, match=remedy) as error:
        balancer.load(path)
    assert_same(duals(model), before)
    assert torch.equal(logits_of(model), logits)
    return str(error.value)


@pytest.mark.parametrize("content", [b"not a sidecar", b"\xff" * 64, b"\0" * 64, b'{"steps": 3}' * 10])
def test_garbage_sidecar(content, tmp_path):
    (tmp_path / STATE_NAME).write_bytes(content)
    refused(trained("mixtral", BIAS), tmp_path, "damaged.*(copy it again|delete it)")


def test_bad_sidecar_through_from_pretrained(saved, tmp_path, warned):
    folder, content = saved
    for name in os.listdir(folder):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / STATE_NAME).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not is_patched(phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=False))
    assert not warned.about(STATE_NAME)
    (tmp_path / STATE_NAME).unlink()  # the remedy: fresh duals
    assert phb.get_balancer(phb.AutoModelForCausalLM.from_pretrained(tmp_path)).steps == 0
    assert len(warned.about("start anew")) == 1


@pytest.mark.parametrize(
    ("other", "overrides", "remedy"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 0, "num_hidden_layers": 4}, "another model"),  # one more layer
        ("gpt_oss", {}, "another model"),  # other names
        ("mixtral", {"num_local_experts": 4}, "4.*8 experts.*another model"),
        ("mixtral", {"num_hidden_layers": 2}, "no 'layers.2"),
        ("mixtral", {"num_hidden_layers": 4}, "another model"),
    ],
)
def test_sidecar_of_another_model(other, overrides, remedy, tmp_path):
    writer = trained(other, BIAS, **overrides)
    phb.get_balancer(writer).save(tmp_path)
    refused(trained("mixtral", BIAS), tmp_path, remedy)


def test_damaged_values(saved, tmp_path):
    model = trained("mixtral", BIAS)

    def nan(state):
        state[f"{NAME}.mean_probs"][3] = float("nan")

    def infinite_bias(state):
        state[f"{NAME}.bias"][0] = float("inf")

    for change, remedy in (
        (nan, "mean_probs.*not finite.*earlier checkpoint"),
        (infinite_bias, "bias.*not finite.*earlier checkpoint"),
        (lambda state: state.pop(f"{NAME}.mean_load"), "no .*mean_load.*fresh duals"),
        (lambda state: state.pop(f"{NAME}.bias"), "no .*bias.*fresh duals"),
        (
            lambda state: state.update({"extra.mean_load": torch.ones(8)}),
            "'extra.mean_load'.*another model",
        ),
        (lambda state: state.update({f"{NAME}.variance": torch.ones(8)}), "variance"),
    ):
        path = tmp_path / STATE_NAME
        path.write_bytes(saved[1])
        rewrite(path, change)
        refused(model, path, remedy)


def test_no_sidecar_at_all(tmp_path):
    model = trained("mixtral", GRADIENT)
    with pytest.raises(FileNotFoundError, match="saved while patched"):
        phb.get_balancer(model).load(tmp_path)


def test_one_flipped_bit_is_always_seen(saved, tmp_path):
    """300 random bits of the file, one at a time: none loads."""
    model = phb.patch(tiny_model("mixtral"), BIAS)
    balancer = phb.get_balancer(model)
    before = balancer.state_dict()
    draw, path = random.Random(0), tmp_path / STATE_NAME
    for bit in draw.sample(range(8 * len(saved[1])), 300):
        content = bytearray(saved[1])
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|not written by|written by hf_phibalance|another model"):
            balancer.load(path)
    assert_same(balancer.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda state: state[f"{NAME}.mean_load"].mul_(7), "mean_load.*no distribution.*sum to 7"),
        (lambda state: state[f"{NAME}.mean_probs"].neg_(), "mean_probs.*no distribution"),
        (lambda state: state.update(steps=torch.tensor(-1)), "steps.*whole number"),
        (lambda state: state.update(steps=torch.tensor(2.0)), "steps.*whole number"),
        (lambda state: state.update(steps=torch.tensor([1, 2])), "steps.*whole number"),
        (lambda state: state.update({f"{NAME}.bias": state[f"{NAME}.bias"].to(torch.int32)}), "int32.*float32"),
        (lambda state: state.update({f"{NAME}.mean_load": state[f"{NAME}.mean_load"].half()}), "float16.*float32"),
        (lambda state: state.update({k: v.bfloat16() for k, v in state.items() if k != "steps"}), "bfloat16.*float32"),
    ],
    ids=["times_7", "negated", "negative_steps", "float_steps", "two_steps", "int32", "fp16", "bf16"],
)
def test_what_no_training_can_have_left(change, remedy, saved, tmp_path):
    """Whole files, rightly signed, whose content makes no sense; also as a state dict in memory."""
    model = trained("mixtral", BIAS)
    path = tmp_path / STATE_NAME
    path.write_bytes(saved[1])
    rewrite(path, change)
    refused(model, path, remedy)
    state = load_file(path)
    with pytest.raises(ValueError, match=remedy):
        phb.get_balancer(model).load_state_dict(state)


@pytest.mark.parametrize(
    ("headers", "remedy"),
    [
        (lambda header: header.clear(), "not written by hf_phibalance"),
        (
            lambda header: header.update(phi_balance="2", version="99.0"),
            "phibalance '99.0' in format '2'.*reads format '1'",
        ),
        (lambda header: header.pop("checksum"), "damaged.*checksum"),
        (lambda header: header.update(note="x"), "damaged.*note"),
    ],
    ids=["absent", "future_format", "unsigned", "more"],
)
def test_headers_of_others(headers, remedy, saved, tmp_path):
    path = tmp_path / STATE_NAME
    path.write_bytes(saved[1])
    rewrite(path, headers=headers)
    refused(trained("mixtral", BIAS), path, remedy)


def test_a_changed_configuration_is_seen(saved, tmp_path):
    """The header is under the checksum as well."""
    path = tmp_path / STATE_NAME
    path.write_bytes(saved[1])
    changed = json.dumps(phb.PhiBalanceConfig(coef=0.25).to_dict())
    rewrite(path, headers=lambda header: header.update(config=changed), sign=False)
    refused(trained("mixtral", BIAS), path, "damaged.*checksum")


def test_routers_of_the_same_names_and_sizes(tmp_path):
    one, other = phb.patch(tiny_model("qwen3_moe", mlp_only_layers=[]), BIAS), phb.patch(tiny_model("mixtral"), BIAS)
    assert phb.get_balancer(one).layer_names == phb.get_balancer(other).layer_names
    phb.get_balancer(one).save(tmp_path)
    refused(other, tmp_path, "type 'qwen3_moe'.*type 'mixtral'")


def test_another_number_of_experts_per_token_is_none_of_these(tmp_path):
    one, other = trained("mixtral", BIAS), phb.patch(tiny_model("mixtral", num_experts_per_tok=3), BIAS)
    phb.get_balancer(one).save(tmp_path)
    phb.get_balancer(other).load(tmp_path)
    assert_same(duals(other), duals(one))
