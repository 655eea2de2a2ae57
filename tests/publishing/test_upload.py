"""Uploads: what a stub of the Hub receives, failures and retries, and what is refused."""

import pytest
from checks import assert_same_duals
from hub_stub import DROP, REPO, TOKEN, contents
from huggingface_hub import HfApi, ModelCard
from training import tokenizer

import hf_phibalance as phb
from hf_phibalance.publishing import push_to_hub
from hf_phibalance.publishing.licence import base_licence
from hf_phibalance.publishing.upload import upload
from hf_phibalance.sidecar import STATE_NAME


@pytest.mark.parametrize("kind", ["trained", "adapter"])
def test_the_hub_receives_the_dry_run(kind, request, run_folder, stub, tmp_path):
    model = request.getfixturevalue(kind)
    stub.cards["lab/base"] = "---\nlicense: mit\n---\n"
    base_licence("lab/base", online=True)  # now in the cache, as after a download
    arguments = {"tokenizer": tokenizer(), "run_folder": run_folder}
    dry = push_to_hub(model, REPO, **arguments, dry_run=tmp_path / "dry")
    commit = push_to_hub(model, REPO, **arguments, private=True, commit_message="First")
    assert stub.files[REPO] == contents(dry)
    assert stub.private[REPO] and commit.commit_url.startswith(f"{stub.endpoint}/{REPO}/commit/")
    assert [(name, message) for name, message, _ in stub.commits] == [(REPO, "First")]
    assert stub.count("PUT", "/lfs/") > 0
    push_to_hub(model, REPO, **arguments)  # nothing has changed: no second commit
    assert len(stub.commits) == 1


def test_what_was_uploaded_loads_by_its_name(trained, stub):
    push_to_hub(trained, REPO)
    assert_same_duals(phb.AutoModelForCausalLM.from_pretrained(REPO), trained)


def test_an_upload_without_duals_takes_none_away(stub, tmp_path):
    stub.files[REPO], stub.private[REPO] = {STATE_NAME: b"somebody's"}, False
    (tmp_path / "config.json").write_text("{}")
    upload(tmp_path, REPO)
    assert stub.files[REPO].keys() == {STATE_NAME, "config.json"}


def test_pull_request(trained, stub):
    assert push_to_hub(trained, REPO, create_pr=True).pr_url == f"{stub.endpoint}/{REPO}/discussions/1"
    stub.fail("POST", "/commit/", 503)
    with pytest.raises(ConnectionError):  # not tried twice: it may have been opened
        push_to_hub(trained, REPO, create_pr=True)
    assert len(stub.commits) == 1


@pytest.mark.parametrize(
    "fault",
    [("POST", "repos/create", 503), ("POST", "/commit/", 500), ("POST", "/commit/", DROP), ("PUT", "/lfs/", 503)],
)
def test_a_passing_failure_is_retried(fault, trained, stub, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    stub.fail(*fault)
    push_to_hub(trained, REPO)
    assert stub.count(fault[0], fault[1]) >= 2 and len(stub.commits) == 1
    assert "phi_balance.state" in stub.files[REPO]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tiny-")] == []


@pytest.mark.parametrize(
    "fault, reason", [(("POST", "/commit/", 500), "HTTP 500"), (("PUT", "/lfs/", DROP), "failed \\((?!HTTP)")]
)
def test_a_lasting_failure_keeps_the_folder(fault, reason, trained, run_folder, stub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stub.fail(*fault, times=100)
    with pytest.raises(ConnectionError, match=reason) as caught:
        push_to_hub(trained, REPO, run_folder=run_folder, max_retries=1)
    (kept,) = [path for path in tmp_path.iterdir() if path.name.startswith("tiny-")]
    assert f"hf upload {REPO} {kept} ." in str(caught.value)
    assert not stub.files[REPO] and stub.count("POST", "repos/create") == 2
    before = contents(kept)
    stub.recover()
    upload(kept, REPO)
    assert stub.files[REPO] == before == contents(kept)


def test_a_refused_token_is_said(trained, stub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PermissionError, match=r"HTTP 401.*hf auth login.*is kept in") as caught:
        push_to_hub(trained, REPO, token="hf_wrong")
    assert stub.count("POST", "repos/create") == 1  # waiting would not help
    assert "hf_wrong" not in str(caught.value)


def test_refused_metadata(trained, stub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    card = ModelCard("---\nlicense: not-a-licence\n---\n\n# Mine\n")
    with pytest.raises(ValueError, match="must be one of"):
        card.validate()
    with pytest.raises(ValueError, match=r"(?s)me/tiny was not uploaded:.*must be one of.*is kept in"):
        push_to_hub(trained, REPO, card=card)
    assert not stub.commits and stub.count("POST", "validate-yaml") == 2


def test_whoami_of_the_stub(stub):
    """The stub is reached by the library's own calls, not only by ours."""
    assert HfApi(token=TOKEN).whoami()["name"] == "me"
