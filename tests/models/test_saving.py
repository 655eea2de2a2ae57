"""Saving and loading: an ordinary checkpoint for plain transformers, a patched model with its duals through the flag."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_batch, tiny_config, tiny_model
from transformers import MixtralForCausalLM, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import hf_phibalance as phb
from hf_phibalance.balancing.duals import STATE_NAME


GRADIENT = {"coef": 0.5}
BIAS = {"coef": 0.5, "bias_coef": 0.2}
NATIVE = ["deepseek_v3", "minimax_m2", "ernie4_5_moe"]
RESELECTING = ["mixtral", "gpt_oss", "deepseek_v2"]


def trained(model_type, config, steps=2, **overrides):
    """A patched model after some optimizer steps, in eval mode."""
    model = phb.patch(tiny_model(model_type, **overrides).train(), config)
    balancer = phb.get_balancer(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(steps):
        model(**tiny_batch(model, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    return model.eval()


def logits_of(model):
    with torch.no_grad():
        return model(**tiny_batch(model)).logits


def duals(model):
    """Everything a balancer carries from step to step, `{kind/layer: tensor}`."""
    balancer = phb.get_balancer(model)
    tensors = {"steps": torch.tensor(balancer.steps)}
    for kind, by_layer in (
        ("probs", balancer.means("probs")),
        ("load", balancer.means("load")),
        ("price", balancer.prices()),
        ("bias", balancer.biases()),
    ):
        tensors |= {f"{kind}/{name}": value for name, value in by_layer.items()}
    return tensors


def assert_same_duals(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def is_patched(model):
    try:
        phb.get_balancer(model)
    except ValueError:
        return False
    return True


def rewrite(path, change):
    """Applies `change` to the tensors of a sidecar."""
    state = load_file(path)
    change(state)
    save_file(state, path)


# ---------------------------------------------------------------------- what is written


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


def test_sidecar_says_what_it_is(tmp_path):
    model = trained("mixtral", GRADIENT)
    assert phb.get_balancer(model).save(tmp_path) == tmp_path / STATE_NAME
    with safe_open(tmp_path / STATE_NAME, framework="pt") as file:
        header, keys = file.metadata(), set(file.keys())
    assert phb.PhiBalanceConfig.from_dict(json.loads(header["config"])) == phb.PhiBalanceConfig(**GRADIENT)
    assert header["version"] == phb.PhiBalanceConfig().to_dict()["version"]
    names = [f"model.layers.{i}.mlp.gate" for i in range(3)]
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


# ---------------------------------------------------------------------- loads through the flag


@pytest.mark.parametrize("config", [GRADIENT, BIAS], ids=["gradient", "bias"])
@pytest.mark.parametrize("model_type", [*NATIVE, *RESELECTING])
def test_comes_back_patched_with_its_duals(model_type, config, tmp_path):
    model = trained(model_type, config, steps=3)
    before = duals(model)
    assert all(value.any() for name, value in before.items() if name.startswith("price/"))
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert phb.get_balancer(loaded).config == phb.PhiBalanceConfig(**config)
    assert_same_duals(duals(loaded), before)
    assert torch.equal(logits_of(loaded), logits_of(model))
    for one in (model, loaded):  # and goes on the same way
        one.train()(**tiny_batch(one, seed=9)).loss.backward()
        phb.get_balancer(one).step()
    assert_same_duals(duals(loaded), duals(model))
    gradients = [{name: p.grad for name, p in one.named_parameters() if p.grad is not None} for one in (model, loaded)]
    for name, gradient in gradients[0].items():  # bit-identical but for the memory alignment of loaded weights
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_the_flag_decides(tmp_path):
    model = trained("mixtral", {"coef": 0.25, "ema_rate": 0.5})
    model.save_pretrained(tmp_path)
    load = phb.AutoModelForCausalLM.from_pretrained
    assert not is_patched(load(tmp_path, phi_balance=False))
    for flag, expected in (
        (None, phb.PhiBalanceConfig(coef=0.25, ema_rate=0.5)),
        (True, phb.PhiBalanceConfig(coef=0.25, ema_rate=0.5)),
        ({"coef": 0.75}, phb.PhiBalanceConfig(coef=0.75)),
        (phb.PhiBalanceConfig(coef=0.125), phb.PhiBalanceConfig(coef=0.125)),
    ):
        loaded = load(tmp_path, phi_balance=flag)
        assert phb.get_balancer(loaded).config == expected
        assert phb.PhiBalanceConfig.from_any(loaded.config.phi_balance) == expected
        assert_same_duals(duals(loaded), duals(model))


def test_a_model_that_was_never_patched(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    load = phb.AutoModelForCausalLM.from_pretrained
    assert not is_patched(load(tmp_path)) and not is_patched(load(tmp_path, phi_balance=False))
    fresh = load(tmp_path, phi_balance=True)
    assert phb.get_balancer(fresh).config == phb.PhiBalanceConfig()
    assert not any(price.any() for price in phb.get_balancer(fresh).prices().values())
    loaded, info = load(tmp_path, phi_balance=GRADIENT, output_loading_info=True)
    assert is_patched(loaded) and not any(info.values())


def test_from_config():
    config = tiny_config("mixtral")
    make = phb.AutoModelForCausalLM.from_config
    assert not is_patched(make(config)) and not is_patched(make(config, phi_balance=False))
    assert phb.get_balancer(make(tiny_config("mixtral"), phi_balance=True)).config == phb.PhiBalanceConfig()
    config.phi_balance = {"coef": 0.25}
    assert phb.get_balancer(make(config)).config == phb.PhiBalanceConfig(coef=0.25)


@pytest.mark.parametrize("flag", [{"coef": -1.0}, {"coeff": 1.0}, "yes", 3])
def test_a_bad_flag_fails_before_anything_is_loaded(flag, tmp_path):
    with pytest.raises(ValueError, match=r"coef|PhiBalanceConfig"):
        phb.AutoModelForCausalLM.from_pretrained(tmp_path / "no such folder", phi_balance=flag)
    with pytest.raises(ValueError, match=r"coef|PhiBalanceConfig"):
        phb.AutoModelForCausalLM.from_config(tiny_config("mixtral"), phi_balance=flag)


def test_sharded_checkpoint_and_subfolder(tmp_path):
    model = trained("mixtral", BIAS)
    model.save_pretrained(tmp_path / "inner", max_shard_size="50KB")
    assert len(list((tmp_path / "inner").glob("model-*.safetensors"))) > 2
    for loaded in (
        phb.AutoModelForCausalLM.from_pretrained(tmp_path / "inner"),
        phb.AutoModelForCausalLM.from_pretrained(str(tmp_path), subfolder="inner"),
    ):
        assert_same_duals(duals(loaded), duals(model))
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_another_dtype_keeps_the_duals_in_fp32(tmp_path):
    model = trained("deepseek_v3", BIAS)
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert_same_duals(duals(loaded), duals(model))


# ---------------------------------------------------------------------- enable and disable


OWNERS = [(PreTrainedModel, "from_pretrained"), (PreTrainedModel, "_from_config")]
OWNERS += [
    (auto, name)
    for auto in (_BaseAutoModelClass, transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    for name in ("from_pretrained", "from_config")
]


@pytest.fixture
def enabled():
    phb.enable()
    yield
    phb.disable()


def test_disable_restores_the_very_same_functions():
    before = [vars(owner)[name] for owner, name in OWNERS]
    phb.enable()
    once = [vars(owner)[name] for owner, name in OWNERS]
    assert all(a is not b for a, b in zip(once, before))
    phb.enable()
    assert all(vars(owner)[name] is a for (owner, name), a in zip(OWNERS, once))
    phb.disable()
    assert all(vars(owner)[name] is a for (owner, name), a in zip(OWNERS, before))
    phb.disable()
    assert all(vars(owner)[name] is a for (owner, name), a in zip(OWNERS, before))
    with pytest.raises(TypeError, match="phi_balance"):
        transformers.AutoModelForCausalLM.from_config(tiny_config("mixtral"), phi_balance=True)


def test_entry_points_accept_the_flag(enabled, tmp_path):
    model = trained("mixtral", GRADIENT)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    for loaded in (
        auto.from_pretrained(tmp_path, phi_balance=True),
        auto.from_pretrained(pretrained_model_name_or_path=tmp_path, phi_balance=True),
        MixtralForCausalLM.from_pretrained(tmp_path, phi_balance=True),
        MixtralForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path, phi_balance=GRADIENT),
        auto.from_pretrained(tmp_path, phi_balance=True, output_loading_info=True)[0],
        phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=True),
        phb.AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert phb.get_balancer(loaded).config == phb.PhiBalanceConfig(**GRADIENT)
        assert_same_duals(duals(loaded), duals(model))
        assert torch.equal(logits_of(loaded), logits_of(model))
    for made in (
        auto.from_config(tiny_config("mixtral"), phi_balance=GRADIENT),
        auto.from_config(config=tiny_config("mixtral"), phi_balance=GRADIENT),
        MixtralForCausalLM._from_config(tiny_config("mixtral"), phi_balance=GRADIENT),
    ):
        assert phb.get_balancer(made).config == phb.PhiBalanceConfig(**GRADIENT)


def test_without_the_flag_entry_points_behave_as_ever(enabled, tmp_path):
    model = trained("mixtral", GRADIENT)
    model.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    for loaded in (
        auto.from_pretrained(tmp_path),
        auto.from_pretrained(pretrained_model_name_or_path=tmp_path),
        auto.from_pretrained(tmp_path, phi_balance=False),
        MixtralForCausalLM.from_pretrained(tmp_path),
        MixtralForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path),
        phb.AutoModelForCausalLM.from_pretrained(tmp_path, phi_balance=False),
    ):
        assert not is_patched(loaded)
        assert torch.equal(logits_of(loaded), logits_of(model))
    assert not is_patched(auto.from_config(tiny_config("mixtral")))
    assert not is_patched(auto.from_config(config=tiny_config("mixtral")))
    assert not is_patched(MixtralForCausalLM._from_config(tiny_config("mixtral")))
    with pytest.raises(TypeError, match="no_such_argument"):
        auto.from_config(tiny_config("mixtral"), no_such_argument=1)


def test_errors_do_not_leak_out_of_the_entry_points(enabled, tmp_path):
    auto = transformers.AutoModelForCausalLM
    with pytest.raises(OSError):
        auto.from_pretrained(tmp_path / "nowhere", phi_balance=True)
    with pytest.raises(ValueError, match="coef"):
        auto.from_pretrained(tmp_path / "nowhere", phi_balance={"coef": -1})
    with pytest.raises(ValueError, match="product keys"):
        auto.from_config(tiny_config("doge"), phi_balance=True)
    with pytest.raises(ValueError, match="no router"):
        auto.from_config(transformers.LlamaConfig(**DENSE), phi_balance=True)
    assert not is_patched(auto.from_config(tiny_config("mixtral")))
    assert not is_patched(auto.from_config(transformers.LlamaConfig(**DENSE)))


DENSE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 32,
}


# ---------------------------------------------------------------------- bad sidecars


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
    assert_same_duals(duals(model), before)
    assert torch.equal(logits_of(model), logits)
    return str(error.value)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.3, 0.5, 0.9, -16, -1])
def test_truncated_sidecar(kept, model_type, tmp_path):
    model = trained(model_type, BIAS)
    path = phb.get_balancer(model).save(tmp_path)
    content = path.read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    path.write_bytes(content[:length])
    assert str(path) in refused(model, tmp_path, "damaged.*(copy it again|delete it)")


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
        ("mixtral", {"num_hidden_layers": 2}, "no model.layers.2"),
        ("mixtral", {"num_hidden_layers": 4}, "another model"),
    ],
)
def test_sidecar_of_another_model(other, overrides, remedy, tmp_path):
    phb.get_balancer(trained(other, BIAS, **overrides)).save(tmp_path)
    refused(trained("mixtral", BIAS), tmp_path, remedy)


def test_damaged_values(saved, tmp_path):
    model = trained("mixtral", BIAS)
    name = "model.layers.1.mlp.gate"

    def nan(state):
        state[f"{name}.mean_probs"][3] = float("nan")

    def infinite_bias(state):
        state[f"{name}.bias"][0] = float("inf")

    for change, remedy in (
        (nan, "mean_probs.*not finite.*earlier checkpoint"),
        (infinite_bias, "bias.*not finite.*earlier checkpoint"),
        (lambda state: state.pop(f"{name}.mean_load"), "no .*mean_load.*(configuration beside it|fresh duals)"),
        (lambda state: state.pop(f"{name}.bias"), "no .*bias.*(configuration beside it|fresh duals)"),
        (
            lambda state: state.update({"model.extra.mean_load": torch.ones(8)}),
            "'model.extra.mean_load'.*another model",
        ),
        (lambda state: state.update({f"{name}.variance": torch.ones(8)}), "variance"),
    ):
        path = tmp_path / STATE_NAME
        path.write_bytes(saved[1])
        rewrite(path, change)
        refused(model, path, remedy)


def test_sidecar_without_the_tracked_statistic(tmp_path):
    phb.get_balancer(trained("mixtral", {"track": "load"})).save(tmp_path)
    model = trained("mixtral", {"track": "probs"})
    assert "track" in refused(model, tmp_path, "mean_probs.*configuration beside it")


def test_no_sidecar_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="saved while patched"):
        phb.get_balancer(trained("mixtral", GRADIENT)).load(tmp_path)


# ---------------------------------------------------------------------- the state by itself


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_state_moves_to_another_model_of_the_same_shape(model_type, tmp_path):
    model = trained(model_type, BIAS, steps=3)
    balancer = phb.get_balancer(model)
    other = phb.patch(tiny_model(model_type, seed=5), BIAS)
    phb.get_balancer(other).load_state_dict(balancer.state_dict())
    assert_same_duals(duals(other), duals(model))
    third = phb.patch(tiny_model(model_type, seed=6), BIAS)
    balancer.save(tmp_path / "made" / "on the way")
    phb.get_balancer(third).load(tmp_path / "made" / "on the way")
    assert_same_duals(duals(third), duals(model))
    fourth = phb.patch(tiny_model(model_type, seed=6), BIAS)
    phb.get_balancer(fourth).load(tmp_path / "made" / "on the way" / STATE_NAME)
    assert_same_duals(duals(fourth), duals(model))
    if model_type == "deepseek_v3":
        for site in phb.get_balancer(third).sites:
            assert torch.equal(site.read_native_bias(), balancer.biases()[site.name])


def test_state_dict_is_a_copy():
    balancer = phb.get_balancer(trained("mixtral", BIAS))
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
    for tensor in state.values():
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


def test_a_kill_never_leaves_half_a_file(tmp_path):
    """SIGKILL at 30 moments in the life of processes that save without pause: whatever is there, is whole."""
    script = [sys.executable, "-c", KILLED_WRITERS, tmp_path, os.path.dirname(__file__)]
    result = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
