"""Adapters: each kind that PEFT saves is loaded as by PEFT's own loader, on the class that it was trained on."""

import inspect
import json

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance.models import load_any


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
LORA = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "biases": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["gate", "lm_head"]},
    "token indices": {"trainable_token_indices": {"embed_tokens": [3, 40]}},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "parameters": {"target_parameters": PARAMETERS},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    "some layers": {"layers_to_transform": [1]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "alora": {"alora_invocation_tokens": [4], "task_type": "CAUSAL_LM"},
}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
OTHERS = {
    "AdaLoraConfig": {**ATTENTION, "total_step": 10, "target_r": 2, "init_r": 3},
    "VeraConfig": {**ATTENTION, "r": 2},
    "IA3Config": {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    "LoHaConfig": {**ATTENTION, "r": 2},
    "LoKrConfig": {**ATTENTION, "r": 2},
    "OFTConfig": {**ATTENTION, "r": 0, "oft_block_size": 4},
    "HRAConfig": {**ATTENTION, "r": 2},
    "FourierFTConfig": {**ATTENTION, "n_frequency": 10},
    "VBLoRAConfig": {**ATTENTION, "r": 2, "num_vectors": 4, "vector_length": 4, "topk": 1},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "TrainableTokensConfig": {"token_indices": [3, 40]},
    "PromptTuningConfig": PROMPT,
    "PrefixTuningConfig": PROMPT,
    "PromptEncoderConfig": {**PROMPT, "encoder_hidden_size": 8},
}


def config_of(kind):
    return getattr(peft, kind)(**OTHERS[kind]) if kind in OTHERS else LoraConfig(**{"r": 2, **ATTENTION, **LORA[kind]})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("mixtral").save_pretrained(folder)
    return str(folder)


def moved(model, adapter):
    """`model` with a balanced adapter whose trainable weights have all changed."""
    model = get_peft_model(model, adapter).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return phb.patch(model, {"coef": 0.25})


def outputs(model):
    ids = tiny_batch(model.get_base_model(), 2, 8)["input_ids"]
    ids[:, 5:7] = torch.tensor([4, 40])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*LORA, *OTHERS])
def test_every_kind_comes_back_as_pefts_own_loader_reads_it(kind, base, tmp_path):
    model = moved(transformers.AutoModelForCausalLM.from_pretrained(base), config_of(kind))
    model.save_pretrained(tmp_path)
    own = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path)
    loaded = phb.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(own) and phb.get_balancer(loaded).config.coef == 0.25
    assert torch.equal(outputs(loaded), outputs(own)) and torch.equal(outputs(loaded), outputs(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(phb.AutoModelForCausalLM.from_pretrained(tmp_path / "again")), outputs(model))
    with loaded.disable_adapter():
        assert not torch.equal(outputs(loaded), outputs(model))


def test_transformers_entry_point_with_the_flag_loads_it_too(base, tmp_path):
    model = moved(transformers.AutoModelForCausalLM.from_pretrained(base), config_of("dora"))
    model.save_pretrained(tmp_path / "inner" / "dora")
    phb.enable()
    try:
        loaded, info = transformers.MixtralForCausalLM.from_pretrained(
            tmp_path / "inner", subfolder="dora", phi_balance=True, is_trainable=True, output_loading_info=True
        )
    finally:
        phb.disable()
    assert torch.equal(outputs(loaded.eval()), outputs(model)) and not info["missing_keys"]
    assert phb.get_balancer(loaded).config.coef == 0.25  # from the state in the same subfolder
    trained = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    "labels, name", [(1, "SequenceClassification"), (3, "SequenceClassification"), (5, "TokenClassification")]
)
@pytest.mark.parametrize("has_task", [True, False])
def test_a_classifier_on_a_language_model_keeps_its_head(labels, name, has_task, base, tmp_path):
    model = getattr(phb, f"AutoModelFor{name}").from_pretrained(base, phi_balance=False, num_labels=labels)
    adapter = LoraConfig(**ATTENTION, modules_to_save=["score"]) if not has_task else phb.lora_config(model)
    model = moved(model, adapter)
    model.save_pretrained(tmp_path)
    loaded = load_any(str(tmp_path))
    assert type(loaded.get_base_model()) is type(model.get_base_model())
    assert outputs(loaded).shape[-1] == labels and torch.equal(outputs(loaded), outputs(model))


def test_an_adapter_on_an_adapter_is_refused(base, tmp_path):
    for name in ("first", "second"):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        moved(model, config_of("rslora")).save_pretrained(tmp_path / name)
    path = tmp_path / "second" / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "first")}
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"first, the base model of the adapter in .*second, is an adapter itself"):
        phb.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    path.write_text(json.dumps(values | {"base_model_name_or_path": str(tmp_path / "moved")}))
    with pytest.raises(
        ValueError, match=r"base_model_name_or_path in .*second/adapter_config.json is .*moved', and there is"
    ):
        phb.AutoModelForCausalLM.from_pretrained(tmp_path / "second")


def test_every_auto_class_is_that_of_transformers():
    for name in (name for name in phb.__all__ if name.startswith("AutoModel")):
        cls = getattr(phb, name)
        assert cls.plain is getattr(transformers, name) and f"`transformers.{name}`" in inspect.getdoc(cls)
