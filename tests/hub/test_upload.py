"""Uploads to a stub of the Hub: what it receives, and what is said when it fails."""

import pytest
from checks import assert_same_duals
from hub_stub import DROP, REPO, contents
from huggingface_hub import HfApi, ModelCard
from training import tokenizer

import hf_phibalance as phb
from hf_phibalance.hub import push_to_hub


pytestmark = pytest.mark.slow


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
