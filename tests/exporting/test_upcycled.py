"""`phibalance upcycle`: what is written is what `phb.upcycle` makes, completely or not at all, in little memory."""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from checks import assert_same
from huggingface_hub import metadata_load
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_model, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import hf_phibalance as phb
from hf_phibalance import cli
from hf_phibalance.exporting import upcycle_checkpoint, upcycled
from hf_phibalance.models import Upcycling, train_tokenizer


pytestmark = pytest.mark.slow


SHARD = 40_000  # bytes; some matrices of a layer are in one file and some in the next


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny dense model in several files, with a tokenizer and a card. Returns the folder and the model."""

    def save(model_type="llama", auto=AutoModelForCausalLM, **fields):
        model = random_model(auto, tiny_config(model_type, **fields), 0)
        model.generation_config.max_new_tokens = 7
        model.save_pretrained(tmp_path / "dense", max_shard_size=SHARD)
        train_tokenizer(["Two and three make five."], 300).save_pretrained(tmp_path / "dense")
        (tmp_path / "dense/README.md").write_text(
            "---\nlicense: other\nlicense_name: ours\nlanguage: en\n---\n# Dense\n"
        )
        return tmp_path / "dense", model

    return save


def tensors_in(folder):
    return {name: part for file in folder.glob("*.safetensors") for name, part in load_file(file).items()}


CASES = [
    ("llama", {"tie_word_embeddings": True}, {}),
    ("mistral", {"num_key_value_heads": 2}, {"experts": 16, "top_k": 4, "splits": 4, "noise": 0.1}),
    ("qwen2", {"tie_word_embeddings": True}, {"experts": 4, "every": 2, "reinit": 0.5, "seed": 3}),
    ("qwen3", {"head_dim": 16}, {"dense_layers": [0], "router_std": 0.1, "top_k": 3}),
]


@pytest.mark.parametrize("model_type, fields, options", CASES, ids=[case[0] for case in CASES])
def test_it_writes_what_upcycle_makes(model_type, fields, options, saved, tmp_path, capsys):
    """From several files to several files, by the command, with tokenizer, generation config, report and card."""
    source, dense = saved(model_type, **fields)
    assert len(list(source.glob("*.safetensors"))) > 1
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name}", *(value if name == "dense_layers" else [value]))
    ]
    words += ["--max_shard_gb", SHARD / 1e9, "--json", tmp_path / "report.json"]
    assert cli.main(["upcycle", *map(str, [source, tmp_path / "moe", *words])]) == 0
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not any(info.values())
    made = phb.upcycle(dense, **options)
    assert_same(model.state_dict(), made.state_dict())
    assert model.config.to_diff_dict() | {"dtype": None} == made.config.to_diff_dict() | {"dtype": None}
    files = list((tmp_path / "moe").glob("*.safetensors"))
    largest = max(part.nbytes for part in tensors_in(tmp_path / "moe").values())
    assert len(files) > 1 and max(file.stat().st_size for file in files) < max(SHARD, largest) + 10_000
    assert model.generation_config.max_new_tokens == 7
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "moe")]
    first, second = (tokenizer("Three make two.").input_ids for tokenizer in tokenizers)
    assert first == second and len(first) > 3 and tokenizers[1].eos_token == "</s>"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["parameters"] == model.num_parameters() and report["parameters"] > report["active"]
    assert (report["options"]["top_k"], report["source"]) == (options.get("top_k", 2), "dense")
    exact = not {"noise", "reinit"} & options.keys()
    assert (report["difference"]["logit"] < 1e-5) == exact == (report["difference"]["kl"] < 1e-9)
    shown, card = capsys.readouterr().out, (tmp_path / "moe/README.md").read_text()
    assert "On 128 random tokens" in shown and f"{report['difference']['kl']:.2g}" in card
    assert f"- {model.config.model_type}" in card and "of the dense model `dense`" in card
    assert {*(tmp_path / "moe").iterdir()} == {*tmp_path.glob("moe*/*")} and str(tmp_path) not in card


def test_a_model_of_the_hub(saved, tmp_path):
    """The card names the base, and has its license. The files come from the cache."""
    source, _ = saved()
    cached = tmp_path / "cache/models--someone--base"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/mine").write_text("abc")
    source.rename(cached / "snapshots/abc")
    hub = {"revision": "mine", "cache_dir": tmp_path / "cache"}
    report = upcycle_checkpoint("someone/base", tmp_path / "moe", Upcycling(4), **hub)
    assert report.difference.logit < 1e-5
    data = metadata_load(tmp_path / "moe/README.md")
    assert (data["base_model"], data["license"], data["license_name"]) == ("someone/base", "other", "ours")
    assert "language" not in data and {"mixture-of-experts", "mixtral"} <= {*data["tags"]}
    assert "[someone/base](https://huggingface.co/someone/base)" in (tmp_path / "moe/README.md").read_text()


def test_computed_buffers_of_old_checkpoints_are_left_out(saved, tmp_path):
    source, _ = saved()
    shard = max(source.glob("*.safetensors"))
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(shard) | {old: torch.ones(4)}, shard, metadata={"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][old] = shard.name
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    upcycle_checkpoint(source, tmp_path / "moe", Upcycling(4), check=False)
    assert old not in tensors_in(tmp_path / "moe")


# ---------------------------------------------------------------------- completely or not at all


def in_a_child(function, *args):
    """Runs a function in a fork of this process, which has the imports. Returns the exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(120)
    return process.exitcode


def killed(source, destination):
    save, written = upcycled.save_file, []

    def save_or_die(*args, **kwargs):
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(save(*args, **kwargs))

    upcycled.save_file = save_or_die
    upcycle_checkpoint(source, destination, Upcycling(4), max_shard_gb=SHARD / 1e9)


def test_killed_in_the_middle(saved, tmp_path):
    """No folder loads. The next run does not mind what is there."""
    source, _ = saved()
    assert in_a_child(killed, source, tmp_path / "moe") == -signal.SIGKILL
    (left,) = tmp_path.glob(".moe*")
    assert not (tmp_path / "moe").exists() and len(list(left.iterdir())) == 2
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(left)
    upcycle_checkpoint(source, tmp_path / "moe", Upcycling(4))
    assert not left.exists()


@pytest.mark.parametrize("where", ["link", "here"])
def test_an_empty_folder_that_is_there_gets_the_files(where, saved, tmp_path, monkeypatch):
    """A link to it, and the working directory. Folders beside it with like names are not touched."""
    source, _ = saved()
    source = source.rename(tmp_path / "moe.partial")
    (tmp_path / "moe").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "moe")
    monkeypatch.chdir(tmp_path / "moe")
    upcycle_checkpoint(source, {"link": tmp_path / "link", "here": "."}[where], Upcycling(4), check=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.num_local_experts == 4
    assert {path.name for path in tmp_path.iterdir()} == {"moe", "moe.partial", "link"} and source.exists()


def test_an_error_leaves_nothing(saved, tmp_path, monkeypatch):
    source, _ = saved()

    def fail(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("hf_phibalance.exporting.upcycled._write_card", fail)
    with pytest.raises(OSError, match="the disk is full"):
        upcycle_checkpoint(source, tmp_path / "moe", Upcycling(4), check=False)
    assert not list(tmp_path.glob("moe*"))


# ---------------------------------------------------------------------- memory


def measured(source, destination, result):
    """Writes the parameters of the result, and the most memory that it took, in megabytes."""

    def memory():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

    def watch():
        while True:
            seen.append(memory())
            time.sleep(0.002)

    start, seen = memory(), [0.0]
    threading.Thread(target=watch, daemon=True).start()
    report = upcycle_checkpoint(source, destination, Upcycling(16), max_shard_gb=0.01)
    result.write_text(f"{report.parameters} {max(seen) - start}")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_that_of_a_shard_or_a_layer(tmp_path):
    """Of a model of 216 MB, 13 MB of which are a layer, with the comparison."""
    fields = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 16}
    random_model(AutoModelForCausalLM, tiny_config("llama", **fields), 0).save_pretrained(tmp_path / "dense")
    assert in_a_child(measured, tmp_path / "dense", tmp_path / "moe", tmp_path / "result") == 0
    parameters, megabytes = map(float, (tmp_path / "result").read_text().split())
    assert parameters * 4 / 1e6 > 200 and megabytes < 70, megabytes


# ---------------------------------------------------------------------- what is refused


def test_sources_that_are_refused(saved, tmp_path, capsys):
    """Adapters, other heads, quantized models, and weights that are not safetensors, before anything is written."""
    source, _ = saved()
    model = AutoModelForCausalLM.from_pretrained(source)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    random_model(AutoModelForSequenceClassification, tiny_config("llama"), 0).save_pretrained(tmp_path / "head")
    config = json.loads((source / "config.json").read_text())
    for name, change in (("quantized", {"quantization_config": {"quant_method": "gptq"}}), ("no_weights", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
    for name, message in {
        "adapter": r"adapter is an adapter, or has one in its folder. Merge it",
        "head": "'LlamaForSequenceClassification' of model_type='llama' cannot be upcycled",
        "quantized": "`quantization_config` is set",
        "no_weights": "'model.embed_tokens.weight' is not among the tensors",
        "nowhere": "there is no folder",
    }.items():
        assert cli.main(["upcycle", str(tmp_path / name), str(tmp_path / "moe")]) == 1
        assert re.search(message, capsys.readouterr().err), message
    assert not list(tmp_path.glob("moe*"))


def test_damaged_sources(saved, tmp_path, capsys, warned):
    """Those whose weights are damaged are refused. A card or a tokenizer that cannot be read costs a warning, not the model."""
    source, _ = saved()
    shard = max(source.glob("*.safetensors"))
    (source / "README.md").write_bytes(b"---\ntitle: Foo: bar\n---\n")
    (source / "tokenizer.json").write_text("{")
    upcycle_checkpoint(source, tmp_path / "moe", Upcycling(4), check=False)
    assert warned.about("README.md cannot be read") and warned.about(f"no tokenizer: no tokenizer in {source}")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config.num_local_experts == 4
    shard.write_text("version https://git-lfs.github.com/spec/v1")
    for message in (f"{shard} is no whole safetensors file", f"{shard.name}, which .*index.json names, is missing"):
        assert cli.main(["upcycle", str(source), str(tmp_path / "other")]) == 1
        assert re.search(message, capsys.readouterr().err)
        shard.unlink(missing_ok=True)


def test_numbers_and_destinations_that_are_refused(saved, tmp_path, monkeypatch):
    source, _ = saved()
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        upcycle_checkpoint(source, source, Upcycling())
    with pytest.raises(ValueError, match=r"`max_shard_gb` must be more than 0, got 0\.0"):
        upcycle_checkpoint(source, tmp_path / "moe", Upcycling(), max_shard_gb=0.0)
    with monkeypatch.context() as before_it_writes:
        before_it_writes.setattr(upcycled, "_write_weights", None)
        with pytest.raises(ValueError, match=r"no tokenizer in nowhere/at-all .*, use --tokenizer"):
            upcycle_checkpoint(source, tmp_path / "moe", Upcycling(), tokenizer="nowhere/at-all")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = source / index["weight_map"].pop(name := "model.norm.weight")
    save_file({key: part for key, part in load_file(shard).items() if key != name}, shard, metadata={"format": "pt"})
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"'{name}' is not among the tensors"):
        upcycle_checkpoint(source, tmp_path / "moe", Upcycling())
    assert not list(tmp_path.glob("moe*"))
