"""What is saved: an ordinary checkpoint for plain transformers, with the duals beside it, from which every method goes on."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch

import pytest
import torch
import transformers
from checks import assert_same, is_patched
from paths import HELPERS
from safetensors import safe_open
from safetensors.torch import load_file
from steps import EXTRA_COEF, METHODS, SHAPES, build, build_for, micro_batches, step_gradient
from tiny import tiny_batch, tiny_model
from trained import BIAS, GRADIENT, NATIVE, RESELECTING, duals, logits_of, trained

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
    assert STATE_NAME not in os.listdir(tmp_path)


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    model = trained("mixtral", GRADIENT)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
        model.save_pretrained(tmp_path / str(rank))
        monkeypatch.undo()
        assert (STATE_NAME in os.listdir(tmp_path / str(rank))) == (rank == 0)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("model_type", NATIVE)
def test_plain_load_keeps_the_bias_of_native_families(model_type, tmp_path, warned):
    model = trained(model_type, BIAS)
    assert any(bias.abs().max() > 0.1 for bias in phb.get_balancer(model).biases().values())
    model.save_pretrained(tmp_path)
    assert not warned.about("selection bias")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.slow
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


# ---------------------------------------------------------------------- the duals by themselves


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_state_moves_to_another_model_of_the_same_shape(model_type, tmp_path):
    model = trained(model_type, BIAS, steps=3)
    balancer = phb.get_balancer(model)
    other = phb.patch(tiny_model(model_type, seed=5), BIAS)
    phb.get_balancer(other).load_state_dict(balancer.state_dict())
    assert_same(duals(other), duals(model))
    third = phb.patch(tiny_model(model_type, seed=6), BIAS)
    balancer.save(tmp_path / "made" / "on the way")
    phb.get_balancer(third).load(tmp_path / "made" / "on the way")
    assert_same(duals(third), duals(model))
    if model_type == "deepseek_v3":
        for site in phb.get_balancer(third).sites:
            assert torch.equal(site.read_native_bias(), balancer.biases()[site.name])


def test_state_dict_is_a_copy():
    model = trained("mixtral", BIAS)
    balancer = phb.get_balancer(model)
    before = {name: value.clone() for name, value in balancer.state_dict().items()}
    for value in balancer.state_dict().values():
        value.zero_()
    for by_layer in (balancer.means(), balancer.prices(), balancer.biases(), balancer.loads()):
        for value in by_layer.values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in balancer.state_dict().items())


def test_bias_that_was_set_in_the_model_is_the_one_that_is_kept(tmp_path):
    """A native bias is part of the weights: whoever loads other weights gets their bias, in the sidecar as well."""
    model = trained("deepseek_v3", BIAS)
    balancer = phb.get_balancer(model)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    best_biases = balancer.biases()
    model.train()(**tiny_batch(model, seed=9)).loss.backward()
    balancer.step()
    assert any(not torch.equal(bias, best_biases[name]) for name, bias in balancer.biases().items())
    model.load_state_dict(best)  # as load_best_model_at_end does
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model.eval()))
    for name, bias in phb.get_balancer(loaded).biases().items():
        assert torch.equal(bias, best_biases[name])


KILLED_WRITERS = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)  # threads do not survive a fork
sys.path.insert(0, sys.argv[2])
from tiny import tiny_model
import hf_phibalance as phb

# many experts, so that a save mostly writes
model = tiny_model("mixtral", hidden_size=8, intermediate_size=2, num_hidden_layers=2, num_local_experts=20_000)
balancer = phb.get_balancer(phb.patch(model, {"coef": 0.1, "bias_coef": 0.1}))
state = balancer.state_dict()
ready, begun = os.pipe()
for attempt in range(30):
    for name, tensor in state.items():
        if name.endswith(".bias"):
            tensor += 1
    writer = os.fork()
    if not writer:
        balancer.load_state_dict(state)
        balancer.save(sys.argv[1])
        os.write(begun, b".")
        while True:
            balancer.save(sys.argv[1])
    os.read(ready, 1)
    time.sleep(0.0003 * attempt)
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    balancer.load(sys.argv[1])
    for layer, bias in balancer.biases().items():
        assert torch.equal(bias, torch.full_like(bias, attempt + 1.0)), layer
"""


@pytest.mark.slow
def test_a_kill_never_leaves_half_a_file(tmp_path):
    """SIGKILL at 30 moments in the life of processes that save without pause: whatever is there, is whole."""
    script = [sys.executable, "-c", KILLED_WRITERS, tmp_path, HELPERS]
    result = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------------- resumed


RUNS = {
    **{method: {"method": method} for method in METHODS},
    "phi_global": {"price_from": "global", "bias_coef": 0.02},
    "phi_hard": {"price_from": "current", "track": "load"},
    "switch_and_bias": {"method": "switch", "bias_coef": 0.02},
    "quantile_averaged": {"method": "quantile", "bias_coef": 0.3},
}


def train(model, steps, start=0, lr=0.05):
    for step in range(start, start + steps):
        step_gradient(model, micro_batches(model, SHAPES[:2], seed=100 * step))
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= lr * p.grad


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "run"),
    [("mixtral", run) for run in RUNS] + [("deepseek_v3", run) for run in ("loss_free", "quantile", "phi_global")],
)
def test_resumed_training_is_bitwise_the_same(model_type, run, tmp_path):
    config = {**RUNS[run], **EXTRA_COEF}
    straight = phb.patch(build_for(config, model_type), config)
    train(straight, 2)
    weights = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    phb.get_balancer(straight).save(tmp_path)
    train(straight, 2, start=2)
    resumed = phb.patch(build_for(config, model_type, seed=1), config)
    resumed.load_state_dict(weights)
    phb.get_balancer(resumed).load(tmp_path)
    train(resumed, 2, start=2)
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))
    assert_same(phb.get_balancer(resumed).state_dict(), phb.get_balancer(straight).state_dict())
    assert phb.get_balancer(resumed).steps == 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pooled", "quantile", "frozen"])
def test_a_saved_model_comes_back_with_its_method(method, tmp_path):
    model = phb.patch(build("mixtral"), {"method": method, **EXTRA_COEF})
    batches = micro_batches(model)
    step_gradient(model, batches)
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=True).train()
    assert phb.get_balancer(loaded).config == phb.get_balancer(model).config
    assert_same(phb.get_balancer(loaded).state_dict(), phb.get_balancer(model).state_dict())
    assert_same(step_gradient(loaded, batches), step_gradient(model, batches))
