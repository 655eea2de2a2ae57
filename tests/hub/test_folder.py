"""The folder that is uploaded: complete, made without the network, and with nothing private in it."""

import json
import os

import pytest
import torch
from hub_stub import REPO, contents
from huggingface_hub import ModelCard
from tiny import tiny_model
from training import tokenizer

import hf_phibalance as phb
from hf_phibalance.hub import Run, model_card, push_to_hub


def test_dry_run_is_complete_and_touches_no_network(trained, run_folder, no_network, tmp_path):
    folder = push_to_hub(trained, REPO, tokenizer=tokenizer(), run_folder=run_folder, dry_run=tmp_path / "dry")
    assert no_network == []
    names = (
        "README.md config.json generation_config.json model.safetensors phi_balance.state tokenizer.json "
        "tokenizer_config.json metrics.json loads.png curves.png"
    )
    assert sorted(contents(folder)) == sorted(names.split())
    loaded = phb.AutoModelForCausalLM.from_pretrained(folder, phi_balance=True)
    for name, mean in phb.get_balancer(trained).means().items():
        assert torch.equal(phb.get_balancer(loaded).means()[name], mean)


def test_dry_run_of_an_adapter_names_no_folder(adapter, no_network, tmp_path, warned):
    folder = push_to_hub(adapter, REPO, dry_run=tmp_path / "dry")
    assert no_network == []
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "phi_balance.state"]
    assert sorted(contents(folder)) == names
    card, base = ModelCard.load(folder / "README.md"), adapter.peft_config["default"].base_model_name_or_path
    assert card.data.library_name == "peft" and card.data.base_model is None
    assert warned.about(f"The base {base} is a folder of this machine")
    assert not [name for name, content in contents(folder).items() if str(base).encode() in content]
    assert base == adapter.peft_config["default"].base_model_name_or_path  # of the model, nothing was changed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "adapter"])
def test_code_of_the_card_runs(kind, request, tmp_path):
    model = request.getfixturevalue(kind)
    folder = push_to_hub(model, REPO, tokenizer=tokenizer(), dry_run=tmp_path / "dry")
    code, scope = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0], {}
    if kind == "adapter":
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = model.peft_config["default"].base_model_name_or_path
        (folder / "adapter_config.json").write_text(json.dumps(config))
    exec(code.replace(f'"{REPO}"', repr(str(folder))).replace("max_new_tokens=128", "max_new_tokens=2"), scope)
    balancer = phb.get_balancer(scope["model"])
    assert (balancer.config, balancer.steps) == (phb.PhiBalanceConfig(coef=0.5), 1)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["adapter", "run", "config", "explicit"])
@pytest.mark.parametrize("name", ["/nowhere/to/base", "lab/base"])
def test_a_base_that_is_no_repository(name, way, trained, adapter, run_folder, tmp_path, monkeypatch):
    """A folder that is not on this machine is not named in the card; a repository is, in each way."""
    model, options = trained, {}
    if way == "adapter":
        model = adapter
        monkeypatch.setattr(adapter.peft_config["default"], "base_model_name_or_path", name)
    elif way == "config":
        monkeypatch.setattr(trained.config, "_name_or_path", name)
    else:
        run = Run.load(run_folder)
        run.base_model = name if way == "run" else None
        run.save(run_folder)
        options = {"run_folder": run_folder}
        if way == "explicit":
            options["card"] = model_card(run, title="x", base_model=name)
    folder = push_to_hub(model, REPO, **options, dry_run=tmp_path / "dry")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == (name if name == "lab/base" else None)
    assert not [path for path, content in contents(folder).items() if b"/nowhere" in content]


def test_bad_arguments_are_refused(trained, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        push_to_hub(trained, REPO, dry_run=tmp_path)
    with pytest.raises(ValueError, match=r"call phb\.patch\(model\) first"):
        push_to_hub(tiny_model("mixtral"), REPO, dry_run=tmp_path / "new")
    with pytest.raises(ValueError, match="Repo id must"):
        push_to_hub(trained, "a/b/c", dry_run=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_own_card_is_taken_as_it_is(trained, tmp_path):
    card = ModelCard("---\nlicense: mit\n---\n\n# Mine\n")
    folder = push_to_hub(trained, REPO, card=card, dry_run=tmp_path / "dry")
    assert (folder / "README.md").read_text() == str(card)


FILES = ["loads.png", "curves.png", "metrics.json", "history.json", "results_9.json", "unbalanced/metrics.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_a_private_file_is_refused(name, link, trained, run_folder, tmp_path):
    private = tmp_path / "private"
    if (run_folder / name).exists():
        (run_folder / name).rename(private)
    else:
        private.write_text("{}")
    link(private, run_folder / name)
    with pytest.raises(ValueError, match=rf"{name} is a link or no regular file.*put a copy in its place"):
        push_to_hub(trained, REPO, run_folder=run_folder, dry_run=tmp_path / "dry")
    assert not (tmp_path / "dry").exists()


def test_a_picture_is_a_picture(trained, run_folder, tmp_path):
    (run_folder / "loads.png").write_bytes((run_folder / "loads.png").read_bytes() + b"private notes")
    with pytest.raises(ValueError, match=r"loads\.png is no PNG picture"):
        push_to_hub(trained, REPO, run_folder=run_folder, dry_run=tmp_path / "dry")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("secret", "what"),
    [
        ("hf_" + "aB3" * 11 + "x", "a Hugging Face token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("AKIA" + "Q3" * 8, "an Amazon key"),
        ("ghp_" + "a1" * 18, "a GitHub token"),
        ("sk-proj-" + "a1" * 20, "an API key"),
    ],
)
def test_secrets_are_refused_with_file_and_line(secret, what, trained, run_folder, tmp_path):
    values = json.loads((run_folder / "metrics.json").read_text())
    (run_folder / "metrics.json").write_text(json.dumps({**values, "task": f"--key={secret}"}))
    line = Run.load(run_folder).summary().split(secret)[0].count("\n") + 1
    with pytest.raises(ValueError, match=rf"metrics\.json, line {line}, holds what looks like {what}") as caught:
        push_to_hub(trained, REPO, run_folder=run_folder, dry_run=tmp_path / "dry")
    assert secret not in str(caught.value) and not (tmp_path / "dry").exists()
