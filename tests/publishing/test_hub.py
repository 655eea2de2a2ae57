"""Uploads: the folder of a dry run, what a stub of the Hub receives, failures and retries, cards, and `Trainer`."""

import importlib.metadata
import importlib.util
import json
import socket
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from hub_stub import DROP, TOKEN, HubStub
from huggingface_hub import HfApi, ModelCard, constants, parse_eval_result_entries
from paths import ROOT
from peft import LoraConfig, get_peft_model
from tiny import tiny_batch, tiny_model
from training import make_trainer, patched, rows, tokenizer
from transformers import Trainer
from trl import SFTTrainer

import hf_phibalance as phb
from hf_phibalance.publishing import report
from hf_phibalance.publishing import upload as hub


REPO = "me/tiny"


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A stub that huggingface_hub takes for the Hub, with its token stored, and no waiting between attempts."""
    with HubStub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        url = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        huggingface_hub.close_session()
        yield server
    huggingface_hub.close_session()


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach a host fails, and is noted."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("the network is blocked in this test")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the code must not rely on it
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


@pytest.fixture(scope="module")
def trained():
    """A patched model that has taken one balanced step."""
    model = patched(coef=0.5).train()
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    return model.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    tiny_model("mixtral").save_pretrained(base)
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: lab-terms\nlicense_link: LICENSE\n---\n# Base\n"
    )
    model = phb.AutoModelForCausalLM.from_pretrained(base, phi_balance={"coef": 0.5})
    model = phb.patch(get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.train()(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    return model.eval()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The results folder of a short run, beside an unbalanced one, with an evaluation of GSM8K and one of HumanEval."""
    folder = tmp_path_factory.mktemp("results") / "tiny"
    runs = []
    for coef in (0.0, 5.0):
        trainer = make_trainer(patched(coef=coef), folder, eval_dataset=rows(4, seed=1))
        callback = phb.attach(trainer)
        before = trainer.evaluate(metric_key_prefix="untrained")
        trainer.train()
        trainer.evaluate(metric_key_prefix="test")
        figures = {"dataset": "openai/gsm8k", "base_model": "lab/base", "example_prompt": "Question: 1 + 1?\nAnswer:"}
        figures |= {"problems": {"train": 11, "test": 4}, "exact_match": {"untrained": 0.0, "trained": 0.25}}
        balance = phb.get_balancer(trainer.model).config
        runs.append(report.Run.of(trainer, balance, callback.history, before=before, seconds=1.0, **figures))
    report.write_report(folder, runs[1], runs[0], dpi=50)
    evaluations = {
        "eval-gsm8k.json": {
            "task": "gsm8k",
            "metrics": {"strict_match": 0.125, "flexible_extract": 0.25},
            "problems": 1319,
            "settings": {"shots": 5, "temperature": 0.0, "model": str(folder)},
            "command": f"{folder}/bin/python recipes/evaluate.py --model {folder} --task gsm8k",
        },
        "eval-humaneval.json": {
            "task": "humaneval",
            "metrics": {"pass@1": 0.5, "verdicts": ["passed"]},
            "problems": 2,
        },
    }
    for name, evaluation in evaluations.items():
        (folder / name).write_text(json.dumps(evaluation))
    return folder


# ---------------------------------------------------------------------- the folder


def test_dry_run_is_complete_and_touches_no_network(trained, run_folder, no_network, tmp_path):
    folder = hub.push_to_hub(trained, REPO, tokenizer=tokenizer(), run_folder=run_folder, dry_run=tmp_path / "dry")
    assert no_network == []
    names = (
        "README.md config.json generation_config.json model.safetensors phi_balance.safetensors tokenizer.json "
        "tokenizer_config.json metrics.json loads.png curves.png .eval_results/gsm8k.yaml"
    )
    assert sorted(contents(folder)) == sorted(names.split())
    assert json.loads((folder / "config.json").read_text())["phi_balance"]["coef"] == 0.5
    loaded = phb.AutoModelForCausalLM.from_pretrained(folder, phi_balance=True)
    for name, mean in phb.get_balancer(trained).means().items():
        assert torch.equal(phb.get_balancer(loaded).means()[name], mean)
    assert str(run_folder) not in (folder / "README.md").read_text()


def test_dry_run_of_an_adapter(adapter, no_network, tmp_path):
    folder = hub.push_to_hub(adapter, REPO, dry_run=tmp_path / "dry")
    assert no_network == []
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "phi_balance.safetensors"]
    assert sorted(contents(folder)) == names
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model is None  # a folder is no name on the Hub
    assert (card.data.license, card.data.license_name) == ("other", "lab-terms")
    assert str(adapter.peft_config["default"].base_model_name_or_path) not in card.content


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_code_of_the_card_runs(kind, request, run_folder, tmp_path):
    model = request.getfixturevalue({"model": "trained", "adapter": "adapter"}[kind])
    folder = hub.push_to_hub(model, REPO, tokenizer=tokenizer(), dry_run=tmp_path / "dry")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.replace(f'"{REPO}"', repr(str(folder))).replace("max_new_tokens=128", "max_new_tokens=2"), scope)
    balancer = phb.get_balancer(scope["model"])
    assert (balancer.config, balancer.steps) == (phb.PhiBalanceConfig(coef=0.5), 1)


def test_bad_arguments_are_refused(trained, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        hub.push_to_hub(trained, REPO, dry_run=tmp_path)
    with pytest.raises(ValueError, match=r"call phb\.patch\(model\) first"):
        hub.push_to_hub(tiny_model("mixtral"), REPO, dry_run=tmp_path / "new")
    with pytest.raises(ValueError, match="Repo id must"):
        hub.push_to_hub(trained, "a/b/c", dry_run=tmp_path / "new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE=1\. Unset it, or give dry_run"):
        hub.push_to_hub(trained, REPO)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------- the upload


@pytest.mark.parametrize("kind", ["trained", "adapter"])
def test_the_hub_receives_the_dry_run(kind, request, run_folder, stub, tmp_path):
    model = request.getfixturevalue(kind)
    stub.cards["lab/base"] = "---\nlicense: mit\n---\n"
    hub.base_licence("lab/base", online=True)  # now in the cache, as after a download
    arguments = {"tokenizer": tokenizer(), "run_folder": run_folder}
    dry = hub.push_to_hub(model, REPO, **arguments, dry_run=tmp_path / "dry")
    commit = hub.push_to_hub(model, REPO, **arguments, private=True, commit_message="First")
    assert stub.files[REPO] == contents(dry)
    assert stub.private[REPO] and commit.commit_url.startswith(f"{stub.endpoint}/{REPO}/commit/")
    assert [(name, message) for name, message, _ in stub.commits] == [(REPO, "First")]
    assert stub.count("PUT", "/lfs/") > 0
    hub.push_to_hub(model, REPO, **arguments)  # nothing has changed: no second commit
    assert len(stub.commits) == 1


def test_pull_request(trained, stub):
    assert hub.push_to_hub(trained, REPO, create_pr=True).pr_url == f"{stub.endpoint}/{REPO}/discussions/1"
    stub.fail("POST", "/commit/", 503)
    with pytest.raises(ConnectionError):  # not tried twice: it may have been opened
        hub.push_to_hub(trained, REPO, create_pr=True)
    assert len(stub.commits) == 1


@pytest.mark.parametrize(
    "fault",
    [("POST", "repos/create", 503), ("POST", "/commit/", 500), ("POST", "/commit/", DROP), ("PUT", "/lfs/", 503)],
)
def test_a_passing_failure_is_retried(fault, trained, stub, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    stub.fail(*fault)
    hub.push_to_hub(trained, REPO)
    assert stub.count(fault[0], fault[1]) >= 2 and len(stub.commits) == 1
    assert "phi_balance.safetensors" in stub.files[REPO]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tiny-")] == []


@pytest.mark.parametrize(
    "fault, reason", [(("POST", "/commit/", 500), "HTTP 500"), (("PUT", "/lfs/", DROP), "failed \\((?!HTTP)")]
)
def test_a_lasting_failure_keeps_the_folder(fault, reason, trained, run_folder, stub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stub.fail(*fault, times=100)
    with pytest.raises(ConnectionError, match=reason) as caught:
        hub.push_to_hub(trained, REPO, run_folder=run_folder, max_retries=1)
    (kept,) = [path for path in tmp_path.iterdir() if path.name.startswith("tiny-")]
    assert f"hf upload {REPO} {kept} ." in str(caught.value)
    assert not stub.files[REPO] and stub.count("POST", "repos/create") == 2
    before = contents(kept)
    stub.recover()
    hub.upload(kept, REPO)
    assert stub.files[REPO] == before == contents(kept)


def test_a_refused_token_is_said(trained, stub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(PermissionError, match=r"HTTP 401.*hf auth login.*is kept in") as caught:
        hub.push_to_hub(trained, REPO, token="hf_wrong")
    assert stub.count("POST", "repos/create") == 1  # waiting would not help
    assert "hf_wrong" not in str(caught.value)


# ---------------------------------------------------------------------- cards


def test_card_of_a_run(run_folder, trained, stub, tmp_path):
    stub.cards["lab/base"] = "---\nlicense: mit\n---\n"
    hub.base_licence("lab/base", online=True)
    folder = hub.push_to_hub(trained, REPO, run_folder=run_folder, dry_run=tmp_path / "dry")
    card = ModelCard.load(folder / "README.md")
    card.validate()
    data = card.data
    assert (data.base_model, data.datasets, data.license) == ("lab/base", ["openai/gsm8k"], "mit")
    assert (data.library_name, data.pipeline_tag, data.model_name) == ("transformers", "text-generation", "tiny")
    assert {"mixture-of-experts", "phi-balancing", "mixtral"} <= set(data.tags)
    found = {(result.dataset_type, result.metric_type): result.metric_value for result in data.eval_results}
    assert found == {
        ("openai/gsm8k", "exact_match"): 0.25,
        ("openai/gsm8k", "strict_match"): 0.125,
        ("openai/gsm8k", "flexible_extract"): 0.25,
        ("openai/openai_humaneval", "pass@1"): 0.5,
    }
    run, baseline = report.Run.load(run_folder), report.Run.load_baseline(run_folder)
    layers = run.layers()
    assert list(layers) == ["held-out data, before", "held-out data, after"]
    unbalanced = baseline.layers()["held-out data, after"]
    for name in phb.get_balancer(trained).layer_names:
        numbers = [layers["held-out data, before"][name], layers["held-out data, after"][name], unbalanced[name]]
        assert f"| `{name}` | " + " | ".join(f"{number:.3f}" for number in numbers) + " |" in card.text
    assert "GSM8K, all 1319 problems (shots 5, temperature 0.0)" in card.text
    assert "python recipes/evaluate.py --model tiny --task gsm8k" in card.text
    assert "HumanEval, 2 problems" in card.text and "| strict_match | 0.1250 |" in card.text
    assert "mit, that of `lab/base`" in card.text
    for picture in ("loads.png", "curves.png"):
        assert f"]({picture})" in card.text and (folder / picture).is_file()
    for text in ("## Limits", "Versions: ", "`coef=5.0`", "| | unbalanced | φ-balanced |"):
        assert text in card.text


def test_leaderboard_takes_whole_benchmarks_only(run_folder):
    run = report.Run.load(run_folder)
    (text,) = report.eval_result_files(run).values()
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 12.5)
    assert entry.notes == "strict_match, shots 5, temperature 0.0"
    for problems in (100, None):
        run.evaluations[0]["problems"] = problems
        assert report.eval_result_files(run) == {}


def test_card_without_a_run_claims_nothing(trained, tmp_path):
    folder = hub.push_to_hub(trained, REPO, dry_run=tmp_path / "dry")
    card = ModelCard.load(folder / "README.md")
    assert "Nothing was measured on held-out data" in card.text
    assert not card.data.eval_results and "Results" not in card.text and ".png" not in card.text
    assert "license" not in card.data.to_dict() and "datasets" not in card.data.to_dict()


def test_a_card_names_the_method(tmp_path):
    model = patched()
    phb.patch(model, {"method": "loss_free"})
    folder = hub.push_to_hub(model, REPO, dry_run=tmp_path / "dry")
    card = ModelCard.load(folder / "README.md")
    text = " ".join(card.text.split("## Use")[0].split())
    assert "routers balanced by the method `loss_free` (arXiv 2408.15664" in text and "φ-balanced" not in text
    assert "phi-balancing" not in card.data.tags
    run, _ = hub._load_run(model, None)
    assert run.name == "loss_free" and "φ-balanc" not in report.balance_section(run)


def test_own_card_is_taken_as_it_is(trained, tmp_path):
    card = ModelCard("---\nlicense: mit\n---\n\n# Mine\n")
    folder = hub.push_to_hub(trained, REPO, card=card, dry_run=tmp_path / "dry")
    assert (folder / "README.md").read_text() == str(card)


def test_refused_metadata(trained, stub, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    card = ModelCard("---\nlicense: not-a-licence\n---\n\n# Mine\n")
    with pytest.raises(ValueError, match="must be one of"):
        card.validate()
    with pytest.raises(ValueError, match=r"(?s)me/tiny was not uploaded:.*must be one of.*is kept in"):
        hub.push_to_hub(trained, REPO, card=card)
    assert not stub.commits and stub.count("POST", "validate-yaml") == 2


def test_licence_is_inherited_never_invented(stub, run_folder, trained, tmp_path, warned):
    stub.cards["lab/base"] = "---\nlicense: mit\n---\n# Base\n"
    stub.cards["lab/bare"] = "# No metadata\n"
    dry = hub.push_to_hub(trained, REPO, run_folder=run_folder, dry_run=tmp_path / "dry")
    assert warned.about("hf download lab/base README.md")  # a dry run asks nobody
    card = ModelCard.load(dry / "README.md")
    assert card.data.license is None and "none was found for `lab/base`" in card.text
    assert hub.base_licence("lab/base", online=True) == {"license": "mit"}
    assert hub.base_licence("lab/base") == {"license": "mit"}  # now in the cache
    assert hub.base_licence("lab/bare", online=True) == {}
    assert hub.base_licence("lab/unknown", online=True) == {} and warned.about("lab/unknown could not be looked up")
    assert hub.base_licence(str(tmp_path)) == {}


def test_result_of_the_evaluation_recipe():
    """Its task is among the settings; generated problems are not the benchmark, whatever their number."""
    settings = {"task": "gsm8k", "dataset_path": "openai/gsm8k", "num_fewshot": 5, "prompts": "ab12", "revision": None}
    result = {"file": "eval-x.json", "metrics": {"strict_match": 0.5}, "problems": 1319, "settings": settings}
    result["balance"] = {"max_vio": 0.25}
    shown = report.evaluation_text(result)
    assert (shown["name"], shown["settings"]) == ("GSM8K, all 1319 problems", "num_fewshot 5")
    assert shown["rows"] == [("strict_match", "0.5000"), ("MaxVio over prompts and completions", "0.250")]
    assert list(report.eval_result_files(report.Run({}, [], [], [result]))) == ["x.yaml"]
    result["settings"] = {**settings, "dataset_path": "toy"}
    assert report.evaluation_text(result)["name"] == "generated gsm8k problems, 1319 problems"
    assert report.eval_result_files(report.Run({}, [], [], [result])) == {}


def test_cards_are_rendered_by_a_command(run_folder, tmp_path):
    script = ROOT / "recipes" / "render_cards.py"
    spec = importlib.util.spec_from_file_location("render_cards", script)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.main(recipe.make_parser().parse_args([str(run_folder), "--target", str(tmp_path), "--prefix", "a-"]))
    folder = tmp_path / "a-tiny"
    assert sorted(contents(folder)) == ["README.md", "curves.png", "loads.png"]
    assert all((folder / name).stat().st_size < 60_000 for name in ("curves.png", "loads.png"))
    assert ModelCard.load(folder / "README.md").data.eval_results
    run = report.Run.load(run_folder)
    with pytest.raises(ValueError, match="is no untrained twin"):  # it has learnt
        recipe.before_training(run, run, run_folder)


def test_committed_cards_are_valid(stub):
    cards = sorted((ROOT / "model_cards").glob("*/README.md"))
    expected = {"small-gsm8k", "small-humaneval", "tiny-deepseek-v3", "tiny-mixtral", "tiny-qwen3-moe"}
    assert {path.parent.name for path in cards} == expected
    for path in cards:
        card = ModelCard.load(path)
        card.validate()
        assert card.data.eval_results and "held-out data, before | held-out data, after" in card.text
        assert all((path.parent / name).is_file() for name in ("loads.png", "curves.png"))


def test_unreadable_evaluations(tmp_path, warned):
    (tmp_path / "eval-odd.json").write_text('{"task": "odd"}')
    assert report.load_evaluations(tmp_path) == [] and warned.about("eval-odd.json has no `metrics`")
    (tmp_path / "eval-torn.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval-torn\.json is no JSON"):
        report.load_evaluations(tmp_path)


# ---------------------------------------------------------------------- Trainer


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_trainer_uploads_duals_and_says_how_it_balanced(cls, strategy, stub, tmp_path):
    trainer = make_trainer(
        patched(), tmp_path / "out", cls, push_to_hub=True, hub_model_id=REPO, hub_strategy=strategy,
        save_strategy="steps", save_steps=1, max_steps=2,
    )  # fmt: skip
    hub.complete_uploads(trainer, phb.attach(trainer).history)
    trainer.train()
    trainer.push_to_hub()
    in_progress = [changed for _, message, changed in stub.commits if message.startswith("Training in progress")]
    assert "phi_balance.safetensors" in in_progress[0] and in_progress[0].keys() & {"model.safetensors"}
    state = trainer.model.state_dict()
    files = stub.files[REPO]
    local = contents(tmp_path / "out")
    assert files["phi_balance.safetensors"] == local["phi_balance.safetensors"]
    assert ("last-checkpoint/phi_balance.safetensors" in files) == (strategy == "checkpoint")
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert {"mixture-of-experts", "phi-balancing"} <= set(card.data.tags)
    assert "generated" in card.content.lower() or "trl" in card.content.lower()  # the trainer's own draft
    assert "## Expert balance" in card.text and "`coef=5.0`" in card.text
    name = phb.get_balancer(trainer.model).layer_names[0]
    last = [entry for entry in trainer.state.log_history if "moe/max_vio" in entry][-1]
    assert f"{last[f'moe/max_vio/{name}']:.3f} |" in card.text
    saved = tmp_path / "received"
    for path, content in files.items():
        (saved / path).parent.mkdir(parents=True, exist_ok=True)
        (saved / path).write_bytes(content)
    loaded = phb.AutoModelForCausalLM.from_pretrained(saved, phi_balance=True)
    assert phb.get_balancer(loaded).steps == 2
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_trainer_keeps_a_report(stub, run_folder, tmp_path):
    trainer = make_trainer(patched(), tmp_path / "out", hub_model_id=REPO)
    hub.complete_uploads(trainer, phb.attach(trainer).history)
    written = (run_folder / "README.md").read_text()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "README.md").write_text(written)
    trainer.push_to_hub()
    assert stub.files[REPO]["README.md"].decode() == written
    assert "phi_balance.safetensors" in stub.files[REPO]


def test_installed_template(monkeypatch, tmp_path):
    assert report.find_template().parts[-2:] == ("model_cards", "template.md")
    beside = tmp_path / "share" / "hf_phibalance" / "template.md"
    monkeypatch.setattr(report, "__file__", str(tmp_path / "hf_phibalance" / "report.py"))
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match="install hf_phibalance again"):
        report.find_template()
    recorded = importlib.metadata.PackagePath("..", "share", "hf_phibalance", "template.md")
    recorded.dist = SimpleNamespace(locate_file=lambda path: tmp_path / "lib" / path)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [recorded])
    (tmp_path / "lib").mkdir()
    beside.parent.mkdir(parents=True)
    beside.write_text("")
    assert report.find_template().samefile(beside)


def test_whoami_of_the_stub(stub):
    """The stub is reached by the library's own calls, not only by ours."""
    assert HfApi(token=TOKEN).whoami()["name"] == "me"
