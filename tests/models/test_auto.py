"""The flag `phi_balance`: a patched model comes back with its state, also through transformers' own entry points."""

import pytest
import torch
import transformers
from checks import assert_same, is_patched
from tiny import tiny_batch, tiny_config, tiny_model
from trained import BIAS, GRADIENT, NATIVE, RESELECTING, duals, logits_of, trained
from transformers import MixtralForCausalLM, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import hf_phibalance as phb
from hf_phibalance.models import load_any


@pytest.mark.slow
@pytest.mark.parametrize("config", [GRADIENT, BIAS], ids=["gradient", "bias"])
@pytest.mark.parametrize("model_type", [*NATIVE, *RESELECTING])
def test_comes_back_patched_with_its_duals(model_type, config, tmp_path):
    model = trained(model_type, config, steps=3)
    before = duals(model)
    assert all(value.any() for name, value in before.items() if name.startswith("price/"))
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert phb.get_balancer(loaded).config == phb.PhiBalanceConfig(**config)
    assert_same(duals(loaded), before)
    assert torch.equal(logits_of(loaded), logits_of(model))
    for one in (model, loaded):  # training continues in the same way
        one.train()(**tiny_batch(one, seed=9)).loss.backward()
        phb.get_balancer(one).step()
    assert_same(duals(loaded), duals(model))
    gradients = [{name: p.grad for name, p in one.named_parameters() if p.grad is not None} for one in (model, loaded)]
    for name, gradient in gradients[0].items():  # equal up to the memory alignment of loaded weights
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
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
        assert_same(duals(loaded), duals(model))


@pytest.mark.slow
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


@pytest.mark.slow
def test_sharded_checkpoint_and_subfolder(tmp_path):
    model = trained("mixtral", BIAS)
    model.save_pretrained(tmp_path / "inner", max_shard_size="50KB")
    assert len(list((tmp_path / "inner").glob("model-*.safetensors"))) > 2
    for loaded in (
        phb.AutoModelForCausalLM.from_pretrained(tmp_path / "inner"),
        phb.AutoModelForCausalLM.from_pretrained(str(tmp_path), subfolder="inner"),
    ):
        assert_same(duals(loaded), duals(model))
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_another_dtype_keeps_the_duals_in_fp32(tmp_path):
    model = trained("deepseek_v3", BIAS)
    model.save_pretrained(tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert_same(duals(loaded), duals(model))


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


@pytest.mark.slow
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
        assert_same(duals(loaded), duals(model))
        assert torch.equal(logits_of(loaded), logits_of(model))
    for made in (
        auto.from_config(tiny_config("mixtral"), phi_balance=GRADIENT),
        auto.from_config(config=tiny_config("mixtral"), phi_balance=GRADIENT),
        MixtralForCausalLM._from_config(tiny_config("mixtral"), phi_balance=GRADIENT),
    ):
        assert phb.get_balancer(made).config == phb.PhiBalanceConfig(**GRADIENT)


@pytest.mark.slow
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
    auto, sizes = transformers.AutoModelForCausalLM, {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    dense = transformers.LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    with pytest.raises(OSError):
        auto.from_pretrained(tmp_path / "nowhere", phi_balance=True)
    with pytest.raises(ValueError, match="coef"):
        auto.from_pretrained(tmp_path / "nowhere", phi_balance={"coef": -1})
    with pytest.raises(ValueError, match="product keys"):
        auto.from_config(tiny_config("doge"), phi_balance=True)
    with pytest.raises(ValueError, match="no router"):
        auto.from_config(dense, phi_balance=True)
    assert not is_patched(auto.from_config(tiny_config("mixtral")))
    assert not is_patched(auto.from_config(dense))


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"base_model_name_or_path": "lab/ba', "not valid JSON"),
        ('{"base_model_name_or_path": "a", "base_model_name_or_path": "b"}', "given twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "must hold a JSON object"),
        ('{"r": 8}', "must be the name of a model, got None"),
        ('{"base_model_name_or_path": ["lab/base"]}', "must be the name of a model"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(content, reason, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    for load in (load_any, phb.AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=rf"adapter_config\.json.*{reason}.*Save the adapter again"):
            load(str(tmp_path))
