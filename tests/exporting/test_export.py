"""Exports: what is written loads plainly as the same model, costs what the report says, and is refused otherwise."""

import json
import math
import subprocess

import pytest
import torch
import transformers
from adapters import fill
from checks import assert_same
from huggingface_hub import metadata_load
from made_texts import make_tokenizer, words
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from steered import with_bias
from tiny import MODEL_TYPES, random_model, tiny_batch, tiny_config, tiny_model

import hf_phibalance as phb
from hf_phibalance import cli
from hf_phibalance.exporting.checkpoint import split_texts
from hf_phibalance.inspection import parse_domains


pytestmark = pytest.mark.slow


LOSING = [
    name
    for name, family in phb.supported_families().items()
    if family.selection_bias == "re-selected" and not family.refused
]
LOSING = sorted(name for name in {*LOSING} & {*MODEL_TYPES} if f"{name}_text" not in LOSING)  # which it would build
PLAIN_NAMES = ("missing_keys", "unexpected_keys", "mismatched_keys")


@pytest.fixture
def saved(tmp_path):
    """Saves a patched model with its tokenizer and returns the folder."""

    def save(model_type="mixtral"):
        with_bias(model_type).save_pretrained(tmp_path / model_type)
        make_tokenizer().save_pretrained(tmp_path / model_type)
        return tmp_path / model_type

    return save


@pytest.fixture
def text(tmp_path):
    """A file of eight documents of 60 words."""
    rows = "".join(f'{{"text": "{words(60, seed=seed)}"}}\n' for seed in range(8))
    (tmp_path / "text.jsonl").write_text(rows)
    return str(tmp_path / "text.jsonl")


def measured_on(text):
    return split_texts(parse_domains([text]), make_tokenizer(), 16, None)


def naive_loss(model, ids):
    """Mean over the predicted tokens of all sequences, each alone."""
    total, count = 0.0, 0
    for row in ids:
        row = torch.tensor([row])
        with torch.no_grad():
            logits = model(row).logits[0, :-1].double().log_softmax(-1)
        total -= float(logits.gather(-1, row[0, 1:, None]).sum())
        count += row.shape[1] - 1
    return total / count


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LOSING)
def test_every_family_folds_and_loads_plainly(model_type, tmp_path, warned):
    """Only routers change. A plain load of the result has every key, no warning, and the logits of the folded model."""
    model = with_bias(model_type)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    batch = tiny_batch(model, 2, 8)
    report = phb.fold(model, [batch])
    assert report.folded.tokens == int(batch["attention_mask"].sum())
    changed = {name for name, part in model.state_dict().items() if not torch.equal(part, before[name])}
    changed -= {name for name in changed if name.endswith("phi_balance.bias")}  # it is in the routers now
    routers = tuple(f"{router}." for router in phb.get_balancer(model).layer_names)
    assert changed and all(name.startswith(routers) for name in changed)
    with torch.no_grad():
        folded = model(**batch).logits
    phb.unpatch(model).save_pretrained(tmp_path)
    plain, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in PLAIN_NAMES)
    assert not [line for line in warned.lines if "nitialized" in line or "bias" in line]
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, folded, rtol=1e-4, atol=1e-4)


def test_figures_are_those_of_the_written_model_on_texts_it_was_not_fitted_on(saved, text, tmp_path):
    source, destination = saved(), tmp_path / "plain"
    report = phb.export(source, destination, text, max_loss_increase=1.0, seq_len=16)
    fitted, measured = measured_on(text)
    assert measured and not {*map(tuple, fitted)} & {*map(tuple, measured)}
    assert report.variants["folded"].tokens == sum(map(len, measured))
    assert report.fitted_tokens == sum(map(len, fitted))
    plain = transformers.AutoModelForCausalLM
    models = {"folded": plain.from_pretrained(destination), "dropped": plain.from_pretrained(source)}
    models["biased"] = phb.AutoModelForCausalLM.from_pretrained(source)
    losses = {name: naive_loss(model, measured) for name, model in models.items()}
    assert {name: report.variants[name].loss for name in losses} == pytest.approx(losses, rel=1e-5)
    assert report.loss_increase() == pytest.approx(losses["folded"] - losses["biased"], abs=1e-5)
    assert report.loaded_alone["logits_differ_by"] < 1e-5 and report.loaded_alone["warnings"] == []
    written = (destination / "export.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(report.to_dict())) and str(tmp_path) not in written
    assert not list(destination.glob("phi_balance*")) and not list(tmp_path.glob(".*"))
    assert "phi_balance" not in (destination / "config.json").read_text()
    assert "**bias folded into the routers**" in (destination / "README.md").read_text()


@pytest.mark.parametrize("bias, kept, changes", [("drop", "dropped", 0), ("rebalance", "rebalanced", 3)])
def test_other_ways_are_written_if_asked_for(bias, kept, changes, saved, text, tmp_path):
    source = saved()
    report = phb.export(source, tmp_path / "plain", [text], bias=bias, force=True, seq_len=16, check=False)
    written, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", source))
    assert sum(not torch.equal(written[name], before[name]) for name in before) == changes
    assert report.kept == kept and report.loaded_alone is None


@pytest.mark.parametrize("bias", ["native", "none"])
def test_where_no_bias_is_lost_the_weights_stay(bias, saved, tmp_path):
    """The source's card gets one more section."""
    if bias == "native":
        source = saved("deepseek_v3")
    else:
        source = tmp_path / "price"
        phb.patch(tiny_model("mixtral"), {"coef": 0.01}).save_pretrained(source)
    (source / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    report = phb.export(source, tmp_path / "plain", check=False)
    assert (report.bias, report.kept, report.variants) == (bias, None, {})
    assert_same(*(load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", source)))
    card = (tmp_path / "plain/README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# Mine\n\n## Exported for any engine\n")
    assert ("There is no selection bias" in card) == (bias == "none")


def test_weights_that_were_trained_since_are_refused(saved, tmp_path):
    """The same holds after a fold into the folder that the model came from."""
    source = saved()
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[0].mlp.gate.weight.data += 0.1
    model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"phi_balance.state is older than the weights beside it"):
        phb.export(source, tmp_path / "plain")


def test_weights_that_are_missing_are_refused(saved, text, tmp_path, capsys):
    """transformers would draw them at random, and the check would find the same ones."""
    source = saved()
    weights = load_file(source / "model.safetensors")
    kept = {name: part for name, part in weights.items() if ".layers.1." not in name}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'model\.layers\.1.* is missing or has another shape than config.json says"):
        phb.export(source, tmp_path / "plain", [text], bias="drop", force=True)
    for command, status in ((["inspect", str(source), "--texts", text], 1), (["doctor", str(source)], 2)):
        assert cli.main(command) == status
        assert "is missing or has another shape" in capsys.readouterr().err
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert cli.main(["doctor", str(source)]) == 2
    assert "cannot be loaded: " in capsys.readouterr().err
    assert cli.main(["doctor", str(source / "config.json")]) == 2
    assert "is a file: name the folder of the checkpoint" in capsys.readouterr().err


def test_texts_of_one_token(saved, tmp_path):
    """They count, and predict nothing."""
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n' * 4 + f'{{"text": "{words(60)}"}}\n' * 8)
    report = phb.export(
        saved(),
        tmp_path / "plain",
        [str(tmp_path / "short.jsonl")],
        bias="drop",
        force=True,
        batch_size=1,
        check=False,
    )
    assert math.isfinite(report.variants["dropped"].loss)


def test_weights_and_state_of_different_moments_are_refused(saved, tmp_path):
    source = saved("deepseek_v3")
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if name.endswith("e_score_correction_bias"))
    weights[name] += 0.5
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not the one in .*phi_balance\.state \(they differ by up to 0.5\)"):
        phb.export(source, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


# ---------------------------------------------------------------------- adapters, heads, and what transformers does not load


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type, options",
    [
        ("mixtral", {"router": "lora"}),
        ("mixtral", {"targets": "attention", "use_dora": True}),
        ("deepseek_v3", {"router": "full"}),
    ],
)
def test_an_adapter_is_merged(model_type, options, text, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "base", phi_balance={"coef": 0.0, "bias_coef": 0.2})
    model = get_peft_model(model, phb.lora_config(model, **options)).train()
    fill(model, "lora_", 0.2)
    model(**tiny_batch(model)).loss.backward()
    phb.get_balancer(model).step()
    model.eval().save_pretrained(tmp_path / "adapter")
    report = phb.export(tmp_path / "adapter", tmp_path / "plain", [text], max_loss_increase=9.0, seq_len=16)
    _, measured = measured_on(text)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    biased = naive_loss(model, measured)
    assert report.variants["biased"].loss == pytest.approx(biased, rel=1e-5)
    assert naive_loss(plain, measured) - biased == pytest.approx(report.loss_increase(), abs=1e-5)
    assert report.kept == (None if model_type == "deepseek_v3" else "folded")
    assert not list((tmp_path / "plain").glob("adapter*")) and (tmp_path / "plain/tokenizer.json").is_file()
    assert metadata_load(tmp_path / "adapter/README.md")["library_name"] == "peft"
    assert metadata_load(tmp_path / "plain/README.md")["library_name"] == "transformers"
    assert "The adapter was merged into `base`." in (tmp_path / "plain/README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "labels, name", [(1, "SequenceClassification"), (3, "SequenceClassification"), (4, "TokenClassification")]
)
def test_a_classifier_keeps_its_head(labels, name, text, tmp_path):
    """The cost is how far its predictions are from those with the bias, on texts that it was not fitted on."""
    config = tiny_config("mixtral")
    config.num_labels = labels
    auto = getattr(transformers, f"AutoModelFor{name}")
    model = phb.patch(random_model(auto, config, 0), {"bias_coef": 0.003})
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: torch.linspace(-0.1, 0.1, 8) for name in balancer.biases()})
    model.save_pretrained(tmp_path / "mine")
    make_tokenizer().save_pretrained(tmp_path / "mine")
    report = phb.export(tmp_path / "mine", tmp_path / "plain", [text], max_loss_increase=9.0, seq_len=16, batch_size=4)
    plain, info = auto.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info.values())
    losses = []
    for row in measured_on(text)[1]:
        with torch.no_grad():
            found, expected = (one(torch.tensor([row])).logits.reshape(-1, labels) for one in (plain, model))
        kl = (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1)
        losses += ((found - expected).square().flatten() if labels == 1 else kl).tolist()
    assert report.loss_increase() == pytest.approx(sum(losses) / len(losses), rel=1e-3, abs=1e-6) and sum(losses)
    assert report.loaded_alone["class"] == f"MixtralFor{name}"


MTP = {
    "qwen3_next": ["mtp.fc.weight", "mtp.layers.0.mlp.experts.0.gate_proj.weight"],
    "deepseek_v3": ["model.layers.61.eh_proj.weight", "model.layers.61.mlp.experts.0.gate_proj.weight"],
    "glm4_moe": ["model.layers.46.shared_head.norm.weight"],
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MTP)
@pytest.mark.parametrize("as_adapter", [False, True])
def test_layers_that_transformers_does_not_load_are_carried_over(model_type, as_adapter, tmp_path, warned):
    source = tmp_path / "mine"
    phb.patch(tiny_model(model_type), {"coef": 0.01}).save_pretrained(source, max_shard_size="50KB")
    shard = max(source.glob("*.safetensors"))
    added = {name: torch.full((2, 3), float(i)) for i, name in enumerate([*MTP[model_type], "stray.weight"])}
    save_file(load_file(shard) | added, shard, metadata={"format": "pt"})
    index = source / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] |= dict.fromkeys(added, shard.name)
    index.write_text(json.dumps(values))
    if as_adapter:
        model = phb.AutoModelForCausalLM.from_pretrained(source)
        source = tmp_path / "adapter"
        get_peft_model(model, phb.lora_config(model)).save_pretrained(source)
    phb.export(source, tmp_path / "plain", check=model_type == "deepseek_v3" and not as_adapter)
    written = load_file(tmp_path / "plain/model.safetensors")
    assert_same(*({name: tensors[name] for name in MTP[model_type]} for tensors in (written, added)))
    assert "stray.weight" not in written
    assert warned.about("mine are not in the export, because transformers does not load them: stray.weight.")
    assert not warned.about("promises")


def test_layers_that_are_promised_and_missing_are_named(saved, tmp_path, warned):
    phb.export(saved("deepseek_v3"), tmp_path / "plain", check=False)
    assert warned.about("predict_layers=1 for predicting several tokens ahead, but")


# ---------------------------------------------------------------------- what is refused


def test_too_much_loss_is_refused_unless_forced(saved, text, tmp_path, capsys):
    """The command prints the figures first. Nothing is left of what was not written."""
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
        ({}, "The cost of losing it is measured on texts"),
        ({"texts": "math=nowhere.jsonl"}, "`--texts` 'math=nowhere.jsonl': there is no such file"),
        ({"bias": "keep"}, "`bias` must be one of 'fold', 'drop', 'rebalance', got 'keep'"),
        ({"max_loss_increase": -1.0}, "`max_loss_increase` must be a loss per token of 0 or more"),
        ({"texts": "text", "tokenizer": "nowhere/at-all"}, "no tokenizer in nowhere/at-all .*, use --tokenizer"),
        ({"texts": "text", "field": "body"}, "'?body'?"),
        ({"texts": "short"}, "too few to fit on some and measure on others"),
    ],
)
def test_bad_arguments(arguments, message, saved, text, tmp_path):
    """One text or field may be given as a string."""
    (tmp_path / "short.txt").write_text(words(3))
    files = {"text": text, "short": str(tmp_path / "short.txt")}
    arguments = {name: files.get(value, value) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        phb.export(saved(), tmp_path / "plain", **arguments)
    assert not (tmp_path / "plain").exists()


def test_folders_that_cannot_be_exported(saved, text, tmp_path):
    source = saved()
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        phb.export(source, source, [text])
    tiny_model("mixtral").save_pretrained(tmp_path / "unpatched")
    with pytest.raises(ValueError, match="was not saved while φ-balanced"):
        phb.export(tmp_path / "unpatched", tmp_path / "plain")
    base = phb.AutoModelForCausalLM.from_pretrained(tmp_path / "unpatched", phi_balance=True)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, prompt).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"an adapter of the kind PROMPT_TUNING that PEFT cannot merge"):
        phb.export(tmp_path / "prompt", tmp_path / "plain")
    phb.AutoModel.from_pretrained(source).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"headless is a MixtralModel, which has no logits"):
        phb.export(tmp_path / "headless", tmp_path / "plain")
    assert not list(tmp_path.glob("plain*"))


FINE = {**dict.fromkeys(PLAIN_NAMES, ()), "logits_differ_by": 0.0}


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
    done = subprocess.CompletedProcess([], code, json.dumps(FINE | found), "Traceback\nOSError: no such model type\n")
    monkeypatch.setattr("hf_phibalance.exporting.writing.subprocess.run", lambda *args, **kwargs: done)
    with pytest.raises(ValueError, match=message):
        phb.export(saved(), tmp_path / "plain", [text], force=True, seq_len=16)
    assert not (tmp_path / "plain").exists() and not list(tmp_path.glob(".*"))
