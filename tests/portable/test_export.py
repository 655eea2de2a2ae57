"""Exports: what is written loads plainly as the same model, costs what the report says, and is refused otherwise."""

import json
import subprocess

import pytest
import torch
import transformers
from checks import assert_same
from made_texts import make_tokenizer, words
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from steered import with_bias
from tiny import MODEL_TYPES, tiny_batch, tiny_model

import hf_phibalance as phb
from hf_phibalance import cli
from hf_phibalance.inspection import parse_domains
from hf_phibalance.portable.texts import split_texts


LOSING = [
    name
    for name, family in phb.supported_families().items()
    if family.selection_bias == "re-selected" and not family.refused
]
LOSING = sorted(
    name for name in set(LOSING) & set(MODEL_TYPES) if f"{name}_text" not in LOSING
)  # which it would build


@pytest.mark.parametrize("model_type", LOSING)
def test_every_family_folds_and_loads_plainly(model_type, tmp_path, warned):
    """Only routers change; a plain load of the result has every key, no warning, and the logits of the folded model."""
    model = with_bias(model_type)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    batch = tiny_batch(model, 2, 8)
    report = phb.fold(model, [batch])
    assert report.folded.tokens == int(batch["attention_mask"].sum())
    changed = {name for name, part in model.state_dict().items() if not torch.equal(part, before[name])}
    changed -= {name for name in changed if name.endswith("phi_balance.bias")}  # which is in the routers now
    assert changed and all(
        any(name.startswith(f"{router}.") for router in phb.get_balancer(model).layer_names) for name in changed
    )
    with torch.no_grad():
        folded = model(**batch).logits
    phb.unpatch(model).save_pretrained(tmp_path)
    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [line for line in warned.lines if "nitialized" in line or "bias" in line]
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, folded, rtol=1e-4, atol=1e-4)


def naive_loss(model, ids):
    """Mean over the predicted tokens of all sequences, each alone."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ids:
            row = torch.tensor([row])
            logits = model(row).logits[0, :-1].double().log_softmax(-1)
            total -= float(logits.gather(-1, row[0, 1:, None]).sum())
            count += row.shape[1] - 1
    return total / count


def test_figures_are_those_of_the_written_model_on_texts_it_was_not_fitted_on(saved, text, tmp_path):
    source, destination = saved(), tmp_path / "plain"
    report = phb.export(source, destination, [text], max_loss_increase=1.0, seq_len=16)
    fitted, measured = split_texts(parse_domains([text]), make_tokenizer(), 16, None)
    seen = {tuple(row) for row in fitted}
    assert measured and not any(tuple(row) in seen for row in measured)
    assert report.variants["folded"].tokens == sum(map(len, measured))
    assert report.fitted_tokens == sum(map(len, fitted))
    plain = transformers.AutoModelForCausalLM.from_pretrained(destination)
    assert report.variants["folded"].loss == pytest.approx(naive_loss(plain, measured), rel=1e-5)
    dropped = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert report.variants["dropped"].loss == pytest.approx(naive_loss(dropped, measured), rel=1e-5)
    biased = phb.AutoModelForCausalLM.from_pretrained(source)
    assert report.variants["biased"].loss == pytest.approx(naive_loss(biased, measured), rel=1e-5)
    assert report.loss_increase() == pytest.approx(
        naive_loss(plain, measured) - naive_loss(biased, measured), abs=1e-5
    )
    assert report.loaded_alone["logits_differ_by"] < 1e-5 and report.loaded_alone["warnings"] == []
    assert json.loads((destination / "export.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert (
        not list(destination.glob("phi_balance*")) and "phi_balance" not in (destination / "config.json").read_text()
    )
    assert str(tmp_path) not in (destination / "export.json").read_text()
    assert "**bias folded into the routers**" in (destination / "README.md").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("bias", ["drop", "rebalance"])
def test_other_ways_are_written_if_asked_for(bias, saved, text, tmp_path):
    source = saved()
    report = phb.export(source, tmp_path / "plain", [text], bias=bias, force=True, seq_len=16, check=False)
    written, before = load_file(tmp_path / "plain/model.safetensors"), load_file(source / "model.safetensors")
    changed = {name for name in before if not torch.equal(written[name], before[name])}
    assert len(changed) == (0 if bias == "drop" else 3)
    assert report.kept == {"drop": "dropped", "rebalance": "rebalanced"}[bias]
    assert report.loaded_alone is None


def test_a_bias_of_the_familys_own_stays(saved, tmp_path):
    source = saved("deepseek_v3")
    report = phb.export(source, tmp_path / "plain", check=False)
    assert (report.bias, report.kept, report.variants) == ("native", None, {})
    assert_same(load_file(tmp_path / "plain/model.safetensors"), load_file(source / "model.safetensors"))


def test_weights_and_state_of_different_moments_are_refused(saved, tmp_path):
    source = saved("deepseek_v3")
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if name.endswith("e_score_correction_bias"))
    weights[name] += 0.5
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not the one in .*phi_balance\.state \(they differ by up to 0.5\)"):
        phb.export(source, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_without_a_bias_the_weights_stay(tmp_path):
    phb.patch(tiny_model("mixtral"), {"coef": 0.01}).save_pretrained(tmp_path / "price")
    report = phb.export(tmp_path / "price", tmp_path / "plain", check=False)
    assert report.bias == "none"
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("price", "plain")))
    assert "There is no selection bias" in (tmp_path / "plain/README.md").read_text()


def test_the_card_of_the_source_gets_a_section_more(saved, tmp_path):
    source = saved("deepseek_v3")
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    phb.export(source, tmp_path / "plain", check=False)
    card = (tmp_path / "plain/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# Mine\n\n## Exported for any engine\n")


# ---------------------------------------------------------------------- what is refused


def test_too_much_loss_is_refused_unless_forced(saved, text, tmp_path, capsys):
    """The command prints the figures first; nothing is left of what was not written."""
    source, destination = str(saved()), str(tmp_path / "plain")
    command = ["export", source, destination, "--texts", text, "--seq_len", "16", "--bias", "drop", "--no_check"]
    command += ["--max_loss_increase", "0"]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "bias dropped" in captured.out and "r²" in captured.out
    assert "--bias drop raises the loss by" in captured.err and "nothing was written. --bias fold" in captured.err
    assert not (tmp_path / "plain").exists()
    assert cli.main([*command, "--force", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["forced"] and report["loss_increase"] > 0
    assert (tmp_path / "plain/model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "what it costs to do without is measured on texts"),
        ({"bias": "keep"}, "`bias` must be one of 'fold', 'drop', 'rebalance', got 'keep'"),
        ({"max_loss_increase": -1.0}, "`max_loss_increase` must be a loss per token of 0 or more"),
        ({"tokenizer": "nowhere/at-all"}, "has no tokenizer"),
    ],
)
def test_bad_arguments(arguments, message, saved, text, tmp_path):
    texts = [text] if arguments.keys() & {"tokenizer"} else []
    with pytest.raises(ValueError, match=message):
        phb.export(saved(), tmp_path / "plain", texts, **arguments)
    assert not (tmp_path / "plain").exists()


def test_folders_that_cannot_be_exported(saved, text, tmp_path):
    source = saved()
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        phb.export(source, source, [text])
    (tmp_path / "short.txt").write_text(words(3))
    with pytest.raises(ValueError, match="too few to fit on some and measure on others"):
        phb.export(source, tmp_path / "plain", [str(tmp_path / "short.txt")])
    tiny_model("mixtral").save_pretrained(tmp_path / "unpatched")
    with pytest.raises(ValueError, match="was not saved while φ-balanced"):
        phb.export(tmp_path / "unpatched", tmp_path / "plain")
    adapted = get_peft_model(
        phb.patch(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "unpatched"), {"bias_coef": 0.1}),
        LoraConfig(target_modules=["q_proj"], r=2),
    )
    phb.get_balancer(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is an adapter\. Merge it first"):
        phb.export(tmp_path / "adapter", tmp_path / "plain", [text])


FINE = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "logits_differ_by": 0.0}


@pytest.mark.parametrize(
    "code, found, message",
    [
        (0, {"unexpected_keys": ["stray.weight"]}, r"gives 1 unexpected keys, e\.g\. 'stray\.weight'"),
        (0, {"logits_differ_by": 0.5}, r"the logits of the exported checkpoint differ by 0\.5"),
        (0, {"logits_differ_by": float("nan")}, "the logits of the exported checkpoint differ by nan"),
        (1, {}, "does not load without hf_phibalance: OSError: no such model type"),
    ],
)
def test_what_does_not_load_alone_is_not_left_behind(code, found, message, saved, text, tmp_path, monkeypatch):
    """What the process of its own may find."""
    done = subprocess.CompletedProcess([], code, json.dumps(FINE | found), "Traceback\nOSError: no such model type\n")
    monkeypatch.setattr("hf_phibalance.portable.writing.subprocess.run", lambda *args, **kwargs: done)
    with pytest.raises(ValueError, match=message):
        phb.export(saved(), tmp_path / "plain", [text], force=True, seq_len=16)
    assert not (tmp_path / "plain").exists() and not list(tmp_path.glob("*.partial"))
