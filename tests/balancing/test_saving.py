"""What is saved: an ordinary checkpoint for plain transformers, with the duals beside it."""

import json
import os
from fnmatch import fnmatch

import pytest
import torch
import transformers
from checks import is_patched
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_model
from trained import BIAS, GRADIENT, NATIVE, RESELECTING, logits_of, trained

import hf_phibalance as phb
from hf_phibalance.files import STATE_NAME


# of vLLM, SGLang, TGI, llama.cpp and MLX
GLOBS_OF_ENGINES = ("*.safetensors", "consolidated*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.npz")


# ---------------------------------------------------------------------- what is written


def test_no_engine_takes_the_state_for_weights():
    assert not [glob for glob in GLOBS_OF_ENGINES if fnmatch(STATE_NAME, glob)]


def test_a_saved_model_is_the_ordinary_model_plus_a_sidecar(tmp_path):
    plain = tiny_model("mixtral", router_aux_loss_coef=0.02, output_router_logits=True)
    plain.save_pretrained(tmp_path / "plain")
    model = phb.patch(tiny_model("mixtral", router_aux_loss_coef=0.02, output_router_logits=True), GRADIENT)
    assert model.config.router_aux_loss_coef == 0.0 and model.router_aux_loss_coef == 0.0
    model.save_pretrained(tmp_path / "patched")
    assert model.config.router_aux_loss_coef == 0.0 and model.router_aux_loss_coef == 0.0
    assert model.config.output_router_logits is False

    assert set(os.listdir(tmp_path / "patched")) == set(os.listdir(tmp_path / "plain")) | {STATE_NAME}
    plain_config, config = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "patched"))
    assert config.pop("phi_balance") == phb.PhiBalanceConfig(coef=0.5).to_dict()
    assert config == plain_config
    assert config["router_aux_loss_coef"] == 0.02 and config["output_router_logits"] is True
    weights, plain_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("patched", "plain"))
    assert weights.keys() == plain_weights.keys()
    assert all(torch.equal(weights[name], plain_weights[name]) for name in weights)


def test_a_backbone_saved_alone_has_no_bias_of_ours_in_its_weights(tmp_path):
    backbone = trained("mixtral", BIAS).model
    backbone.save_pretrained(tmp_path)
    assert "phi_balance.bias" in backbone.state_dict()
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "phi_balance" in name]


def test_sidecar_says_what_it_is(tmp_path):
    model = trained("mixtral", GRADIENT)
    assert phb.get_balancer(model).save(tmp_path) == tmp_path / STATE_NAME
    with safe_open(tmp_path / STATE_NAME, framework="pt") as file:
        header, keys = file.metadata(), set(file.keys())
    assert phb.PhiBalanceConfig.from_dict(json.loads(header["config"])) == phb.PhiBalanceConfig(**GRADIENT)
    assert header["version"] == phb.PhiBalanceConfig().to_dict()["version"]
    assert header["phi_balance"] == "1"
    names = [f"layers.{i}.mlp.gate" for i in range(3)]
    described = json.loads(header["model"])
    assert described["type"] == "mixtral" and described["routers"] == {name: [8, 2, "softmax"] for name in names}
    assert keys == {"steps"} | {f"{name}.mean_{statistic}" for name in names for statistic in ("probs", "load")}


@pytest.mark.parametrize("how", ["keyword", "positional"])
def test_other_ranks_write_nothing(tmp_path, how):
    model = trained("mixtral", GRADIENT)
    if how == "keyword":
        model.save_pretrained(tmp_path, is_main_process=False)
    else:
        model.save_pretrained(tmp_path, False)
    assert os.listdir(tmp_path) == []


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    model = trained("mixtral", GRADIENT)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        model.save_pretrained(tmp_path / str(rank))
        monkeypatch.undo()
        assert (STATE_NAME in os.listdir(tmp_path / str(rank))) == (rank == 0)


def test_a_model_without_balancing_saves_as_ever(tmp_path):
    model = phb.unpatch(trained("mixtral", GRADIENT))
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert STATE_NAME not in os.listdir(tmp_path)
    assert "phi_balance" not in json.loads((tmp_path / "config.json").read_text())


def test_failing_save_leaves_the_built_in_loss_off(tmp_path, monkeypatch):
    model = trained("mixtral", GRADIENT, router_aux_loss_coef=0.02)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(model.config), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert model.config.router_aux_loss_coef == 0.0 and model.router_aux_loss_coef == 0.0
    phb.unpatch(model)
    assert model.config.router_aux_loss_coef == 0.02 and model.router_aux_loss_coef == 0.02


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_a_selection_bias_of_ours_is_part_of_the_weights_while_patched(model_type, warned):
    """So a state dict brings back what the model computes; only files for others leave it out."""
    model, other = trained(model_type, BIAS), phb.patch(tiny_model(model_type), BIAS)
    plain = tiny_model(model_type).state_dict()
    extra = {"model.phi_balance.bias"} if model_type == "mixtral" else set()
    assert model.state_dict().keys() - plain.keys() == extra
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))
    other.load_state_dict(plain)
    assert torch.equal(logits_of(other), logits_of(tiny_model(model_type)))
    assert bool(warned.about("no selection bias of φ-balancing")) is bool(extra)
    if extra:
        with pytest.raises(RuntimeError, match=r"Unexpected.*model\.phi_balance\.bias"):
            tiny_model(model_type).load_state_dict(model.state_dict())


# ---------------------------------------------------------------------- plain loads


@pytest.mark.parametrize("model_type", [*NATIVE, *RESELECTING])
def test_plain_load_of_a_gradient_only_model(model_type, tmp_path, warned):
    model = trained(model_type, GRADIENT)
    warned.lines.clear()
    model.save_pretrained(tmp_path)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not [line for line in warned.lines if "ey" in line or "phi" in line.lower()], warned.lines
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not is_patched(loaded)
    hooks = [hook for module in loaded.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if type(hook).__module__.startswith("hf_phibalance")]


@pytest.mark.parametrize("model_type", NATIVE)
def test_plain_load_keeps_the_bias_of_native_families(model_type, tmp_path, warned):
    model = trained(model_type, BIAS)
    assert any(bias.abs().max() > 0.1 for bias in phb.get_balancer(model).biases().values())
    model.save_pretrained(tmp_path)
    assert not warned.about("selection bias")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("model_type", RESELECTING)
def test_plain_load_loses_the_bias_elsewhere_and_says_so(model_type, tmp_path, warned):
    model = trained(model_type, BIAS)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert len(warned.about("selection bias")) == 1
    assert "phi_balance flag loses it" in warned.about("selection bias")[0]
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not torch.equal(logits_of(plain), logits_of(model))
    flagged = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(flagged), logits_of(model))
