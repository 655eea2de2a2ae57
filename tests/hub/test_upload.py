"""Uploads to a stub of the Hub: what it receives from us and from `Trainer`, and what is said when it fails."""

import pytest
import torch
from checks import assert_same_duals
from hub_stub import DROP, REPO, contents
from huggingface_hub import HfApi, ModelCard
from training import make_trainer, patched, tokenizer
from transformers import Trainer
from trl import SFTTrainer

import hf_phibalance as phb
from hf_phibalance.hub import push_to_hub


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Returns the folders that failed uploads have kept."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return lambda: [path for path in tmp_path.iterdir() if path.name.startswith("tiny-")]


@pytest.mark.parametrize("kind", ["trained", "adapter"])
def test_the_hub_receives_the_dry_run(kind, request, run_folder, stub, kept, tmp_path):
    model = request.getfixturevalue(kind)
    arguments = {"tokenizer": tokenizer(), "run_folder": run_folder}
    dry = contents(push_to_hub(model, REPO, **arguments, dry_run=tmp_path / "dry"))
    commit = push_to_hub(model, REPO, **arguments, private=True, commit_message="First")
    received = dict(stub.files[REPO])
    assert received.pop("phi_balance.state") and dry.pop("phi_balance.state")  # its metadata have no fixed order
    assert received == dry and stub.private[REPO] and kept() == []
    assert commit.commit_url.startswith(f"{stub.endpoint}/{REPO}/commit/")
    assert [(name, message) for name, message, _ in stub.commits] == [(REPO, "First")]


@pytest.mark.parametrize("fault", [None, 503, DROP])
def test_an_upload_loads_by_its_name_and_takes_nothing_away(fault, trained, stub):
    """`huggingface_hub` tries again after a fault."""
    stub.files[REPO], stub.private[REPO] = {"notes.txt": b"mine"}, False
    if fault is not None:
        stub.fail("PUT", "/lfs/", fault)
    push_to_hub(trained, REPO)
    assert len(stub.commits) == 1 and stub.files[REPO]["notes.txt"] == b"mine"
    assert_same_duals(phb.AutoModelForCausalLM.from_pretrained(REPO), trained)
    assert push_to_hub(trained, REPO, create_pr=True).pr_url == f"{stub.endpoint}/{REPO}/discussions/1"


@pytest.mark.parametrize("fault", [("POST", "/commit/", 500), ("PUT", "/lfs/", DROP), ("POST", "repos/create", 503)])
def test_a_failed_upload_keeps_the_folder(fault, trained, stub, kept):
    stub.fail(*fault, times=100)
    with pytest.raises(RuntimeError, match="me/tiny was not uploaded") as caught:
        push_to_hub(trained, REPO, private=True, create_pr=True, revision="main")
    (folder,) = kept()
    assert str(caught.value).endswith(f"hf upload {REPO} {folder} . --private --create-pr --revision main")
    stub.recover()
    HfApi().create_repo(REPO, exist_ok=True)
    HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    assert stub.files[REPO] == contents(folder)


def test_a_refused_token_and_refused_metadata_are_said(trained, stub, kept):
    with pytest.raises(RuntimeError, match=r"(?s)401.*is kept in") as caught:
        push_to_hub(trained, REPO, token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"(?s)me/tiny was not uploaded:.*must be one of.*is kept in"):
        push_to_hub(trained, REPO, card=ModelCard("---\nlicense: not-a-licence\n---\n\n# Mine\n"))
    assert not stub.commits and len(kept()) == 2


def test_saves_of_transformers_and_peft_upload_the_state(trained, adapter, stub, tmp_path):
    """Also into a folder that was saved to before. Only a save of the model uploads the state."""
    trained.save_pretrained(tmp_path / "mine")
    trained.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id=REPO)
    (_, _, changed) = stub.commits[-1]
    assert {"config.json", "model.safetensors", "phi_balance.state"} <= changed.keys()
    tokenizer().save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id=REPO)
    assert "tokenizer.json" in stub.commits[-1][2] and "phi_balance.state" not in stub.commits[-1][2]
    adapter.push_to_hub("me/adapter")
    assert {"adapter_model.safetensors", "phi_balance.state"} <= stub.files["me/adapter"].keys()


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_trainer_uploads_duals_and_says_how_it_balanced(cls, strategy, stub, tmp_path):
    trainer = make_trainer(
        patched(), tmp_path / "out", cls, push_to_hub=True, hub_model_id=REPO, hub_strategy=strategy,
        save_strategy="steps", save_steps=1, max_steps=2,
    )  # fmt: skip
    history = phb.attach(trainer).history
    trainer.train()
    trainer.push_to_hub()
    in_progress = [changed for _, message, changed in stub.commits if message.startswith("Training in progress")]
    assert "phi_balance.state" in in_progress[0] and in_progress[0].keys() & {"model.safetensors"}
    state = trainer.model.state_dict()
    files = stub.files[REPO]
    local = contents(tmp_path / "out")
    assert files["phi_balance.state"] == local["phi_balance.state"]
    assert ("last-checkpoint/phi_balance.state" in files) == (strategy == "checkpoint")
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert {"mixture-of-experts", "phi-balancing"} <= set(card.data.tags)
    assert "generated" in card.content.lower() or "trl" in card.content.lower()  # the trainer's own draft
    assert "## Expert balance" in card.text and "`coef=5.0`" in card.text
    name = phb.get_balancer(trainer.model).layer_names[0]
    assert f"{max(history[-1]['load'][name]) - 1:.3f} |" in card.text
    saved = tmp_path / "received"
    for path, content in files.items():
        (saved / path).parent.mkdir(parents=True, exist_ok=True)
        (saved / path).write_bytes(content)
    loaded = phb.AutoModelForCausalLM.from_pretrained(saved, phi_balance=True)
    assert phb.get_balancer(loaded).steps == 2
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_trainer_keeps_a_report(stub, trained_run, tmp_path):
    trainer = make_trainer(patched(), tmp_path / "out", hub_model_id=REPO)
    phb.attach(trainer)
    written = (trained_run / "README.md").read_text()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text(written)
    trainer.push_to_hub()
    assert stub.files[REPO]["README.md"].decode() == written
    assert "phi_balance.state" in stub.files[REPO]
