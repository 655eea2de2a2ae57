"""The folder that is uploaded: complete, the same for a dry run, and made without the network."""

import ast
import json
import re

import pytest
import torch
from hub_stub import REPO, contents
from huggingface_hub import ModelCard, constants
from tiny import tiny_model
from training import tokenizer

import hf_phibalance as phb
from hf_phibalance.publishing import Run, push_to_hub
from hf_phibalance.publishing.card import model_card


def test_dry_run_is_complete_and_touches_no_network(trained, run_folder, no_network, tmp_path):
    folder = push_to_hub(trained, REPO, tokenizer=tokenizer(), run_folder=run_folder, dry_run=tmp_path / "dry")
    assert no_network == []
    names = (
        "README.md config.json generation_config.json model.safetensors phi_balance.state tokenizer.json "
        "tokenizer_config.json metrics.json loads.png curves.png .eval_results/gsm8k.yaml"
    )
    assert sorted(contents(folder)) == sorted(names.split())
    assert json.loads((folder / "config.json").read_text())["phi_balance"]["coef"] == 0.5
    loaded = phb.AutoModelForCausalLM.from_pretrained(folder, phi_balance=True)
    for name, mean in phb.get_balancer(trained).means().items():
        assert torch.equal(phb.get_balancer(loaded).means()[name], mean)
    assert str(run_folder) not in (folder / "README.md").read_text()


def test_dry_run_of_an_adapter(adapter, no_network, tmp_path):
    folder = push_to_hub(adapter, REPO, dry_run=tmp_path / "dry")
    assert no_network == []
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "phi_balance.state"]
    assert sorted(contents(folder)) == names
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder is no name on the Hub
    assert (card.data.license, card.data.license_name) == ("other", "lab-terms")
    assert str(adapter.peft_config["default"].base_model_name_or_path) not in card.content


@pytest.mark.parametrize(
    "prompt", ['two """ quotes', "a fence\n```\nin it", 'ends with "', r"a\nb", "a\r\tb\x00", "plain\n  “text”"]
)
def test_any_prompt_in_the_code_of_the_card(prompt, run_folder):
    """It stays a block of code, in which the prompt is what it was."""
    run = Run.load(run_folder)
    run.summary["example_prompt"] = prompt
    text = model_card(run, title="tiny").text
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (assigned,) = (
        node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Assign) and node.targets[0].id == "prompt"
    )
    assert ast.literal_eval(assigned.value) == prompt


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_code_of_the_card_runs(kind, request, run_folder, tmp_path):
    model = request.getfixturevalue({"model": "trained", "adapter": "adapter"}[kind])
    folder = push_to_hub(model, REPO, tokenizer=tokenizer(), dry_run=tmp_path / "dry")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.replace(f'"{REPO}"', repr(str(folder))).replace("max_new_tokens=128", "max_new_tokens=2"), scope)
    balancer = phb.get_balancer(scope["model"])
    assert (balancer.config, balancer.steps) == (phb.PhiBalanceConfig(coef=0.5), 1)


def test_bad_arguments_are_refused(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        push_to_hub(trained, REPO, dry_run=tmp_path)
    with pytest.raises(ValueError, match=r"call phb\.patch\(model\) first"):
        push_to_hub(tiny_model("mixtral"), REPO, dry_run=tmp_path / "new")
    with pytest.raises(ValueError, match="Repo id must"):
        push_to_hub(trained, "a/b/c", dry_run=tmp_path / "new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE=1\. Unset it, or give dry_run"):
        push_to_hub(trained, REPO)
    assert not (tmp_path / "new").exists()


def test_own_card_is_taken_as_it_is(trained, tmp_path):
    card = ModelCard("---\nlicense: mit\n---\n\n# Mine\n")
    folder = push_to_hub(trained, REPO, card=card, dry_run=tmp_path / "dry")
    assert (folder / "README.md").read_text() == str(card)
