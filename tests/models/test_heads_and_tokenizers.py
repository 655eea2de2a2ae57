"""The auto class and the tokenizer of a checkpoint, and the errors if there is none."""

import json

import peft
import pytest
import transformers
from made_texts import words
from tiny import random_model, tiny_batch, tiny_config, tiny_model

import hf_phibalance as phb
from hf_phibalance import cli
from hf_phibalance.inspection import inspect_model
from hf_phibalance.models import auto_class_name, load_any


@pytest.mark.parametrize(
    "model_type, saved_as, expected",
    [
        ("mixtral", "MixtralForSequenceClassification", "AutoModelForSequenceClassification"),
        ("qwen3_moe", "Qwen3MoeForTokenClassification", "AutoModelForTokenClassification"),
        ("mixtral", "MixtralModel", "AutoModel"),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "AutoModelForImageTextToText"),
        ("phimoe", "PhiMoEForCausalLM", "AutoModelForCausalLM"),  # another spelling of transformers' class
        ("of_remote_code", "TheirForSequenceClassification", "AutoModelForSequenceClassification"),
        ("of_remote_code", "TheirVisionModel", "AutoModelForCausalLM"),
        ("mixtral", None, "AutoModelForCausalLM"),
        ("qwen3_vl_moe", None, "AutoModelForImageTextToText"),
    ],
)
def test_the_auto_class_of_a_checkpoint(model_type, saved_as, expected):
    assert auto_class_name(model_type, saved_as and [saved_as]) == expected


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", ""])
def test_a_head_is_kept_by_all_that_load_it(head, tmp_path):
    auto = getattr(transformers, f"AutoModel{head}")
    model = phb.patch(random_model(auto, tiny_config("mixtral"), 0), {"coef": 0.25})
    model.save_pretrained(tmp_path / "mine")
    loaded = load_any(str(tmp_path / "mine"))
    assert type(loaded) is type(model) and phb.get_balancer(loaded).config.coef == 0.25
    phb.push_to_hub(model, "me/mine", dry_run=tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"phb.AutoModel{head}.from_pretrained" in card and "text-generation" not in card and "generate" not in card
    assert cli.main(["doctor", str(tmp_path / "mine"), "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model"]["class"] == type(model).__name__ and abs(report["coefficient"]["ratio"] - 1) < 1e-3


def test_an_unknown_head_is_refused_by_name(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["MixtralForRanking"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"MixtralForRanking of model_type='mixtral' .* its head would be lost"):
        load_any(str(tmp_path))


def test_prompt_learning_is_refused_where_its_prompt_would_be_left_out():
    model = phb.patch(tiny_model("mixtral"), {"coef": 0.01})
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for call in (lambda: phb.calibrate(model, [tiny_batch(model)]), lambda: inspect_model(model, None, [])):
        with pytest.raises(ValueError, match=r"virtual tokens in front of every row.*model.get_base_model\(\)"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen3_moe"]
)  # for Qwen, transformers builds a tokenizer without any file
def test_a_folder_without_tokenizer_is_named_alike_everywhere(model_type, tmp_path, capsys):
    folder, text = str(tmp_path / "mine"), tmp_path / "text.txt"
    phb.patch(tiny_model(model_type), {"coef": 0.01}).save_pretrained(folder)
    text.write_text(words(60))
    for command in (["inspect", folder], ["doctor", folder], ["export", folder, str(tmp_path / "plain")]):
        assert cli.main([*command, "--texts", str(text)]) in (1, 2)
        assert f"no tokenizer in {folder}, use --tokenizer" in " ".join(capsys.readouterr().err.split())
    assert (
        cli.main(["export", folder, str(tmp_path / "plain"), "--no_check"]) == 0
    )  # needs no tokenizer, and writes none
    assert not list((tmp_path / "plain").glob("tokenizer*"))
