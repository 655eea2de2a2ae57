"""Model cards: what they say of a run, where their template and their licence come from, and those that are committed."""

import importlib.metadata
from types import SimpleNamespace

import pytest
from hub_stub import REPO
from huggingface_hub import ModelCard
from paths import ROOT
from training import patched

import hf_phibalance as phb
from hf_phibalance.publishing import Run, push_to_hub
from hf_phibalance.publishing.card import balance_section, find_template
from hf_phibalance.publishing.folder import load_run
from hf_phibalance.publishing.licence import base_licence


def test_card_of_a_run(run_folder, trained, stub, tmp_path):
    stub.cards["lab/base"] = "---\nlicense: mit\n---\n"
    base_licence("lab/base", online=True)
    folder = push_to_hub(trained, REPO, run_folder=run_folder, dry_run=tmp_path / "dry")
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
    run, baseline = Run.load(run_folder), Run.load_baseline(run_folder)
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


def test_card_without_a_run_claims_nothing(trained, tmp_path):
    folder = push_to_hub(trained, REPO, dry_run=tmp_path / "dry")
    card = ModelCard.load(folder / "README.md")
    assert "Nothing was measured on held-out data" in card.text
    assert not card.data.eval_results and "Results" not in card.text and ".png" not in card.text
    assert "license" not in card.data.to_dict() and "datasets" not in card.data.to_dict()


def test_a_card_names_the_method(tmp_path):
    model = patched()
    phb.patch(model, {"method": "loss_free"})
    folder = push_to_hub(model, REPO, dry_run=tmp_path / "dry")
    card = ModelCard.load(folder / "README.md")
    text = " ".join(card.text.split("## Use")[0].split())
    assert "routers balanced by the method `loss_free` (arXiv 2408.15664" in text and "φ-balanced" not in text
    assert "phi-balancing" not in card.data.tags
    run, _ = load_run(model, None)
    assert run.name == "loss_free" and "φ-balanc" not in balance_section(run)


def test_licence_is_inherited_never_invented(stub, run_folder, trained, tmp_path, warned):
    stub.cards["lab/base"] = "---\nlicense: mit\n---\n# Base\n"
    stub.cards["lab/bare"] = "# No metadata\n"
    dry = push_to_hub(trained, REPO, run_folder=run_folder, dry_run=tmp_path / "dry")
    assert warned.about("hf download lab/base README.md")  # a dry run asks nobody
    card = ModelCard.load(dry / "README.md")
    assert card.data.license is None and "none was found for `lab/base`" in card.text
    assert base_licence("lab/base", online=True) == {"license": "mit"}
    assert base_licence("lab/base") == {"license": "mit"}  # now in the cache
    assert base_licence("lab/bare", online=True) == {}
    assert base_licence("lab/unknown", online=True) == {} and warned.about("lab/unknown could not be looked up")
    assert base_licence(str(tmp_path)) == {}


def test_committed_cards_are_valid(stub):
    cards = sorted((ROOT / "model_cards").glob("*/README.md"))
    expected = {"small-gsm8k", "small-humaneval", "tiny-deepseek-v3", "tiny-mixtral", "tiny-qwen3-moe"}
    assert {path.parent.name for path in cards} == expected
    for path in cards:
        card = ModelCard.load(path)
        card.validate()
        assert card.data.eval_results and "held-out data, before | held-out data, after" in card.text
        assert all((path.parent / name).is_file() for name in ("loads.png", "curves.png"))


def test_installed_template(monkeypatch, tmp_path):
    assert find_template().parts[-2:] == ("model_cards", "template.md")
    beside = tmp_path / "share" / "hf_phibalance" / "template.md"
    monkeypatch.setattr(
        f"{find_template.__module__}.__file__", str(tmp_path / "hf_phibalance" / "publishing" / "card.py")
    )
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match="install hf_phibalance again"):
        find_template()
    recorded = importlib.metadata.PackagePath("..", "share", "hf_phibalance", "template.md")
    recorded.dist = SimpleNamespace(locate_file=lambda path: tmp_path / "lib" / path)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [recorded])
    (tmp_path / "lib").mkdir()
    beside.parent.mkdir(parents=True)
    beside.write_text("")
    assert find_template().samefile(beside)
