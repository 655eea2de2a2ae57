"""README.md keeps what it promises: its quick start runs, and logs, saves, merges and takes the memory that it says."""

import json
import re
import shlex

import datasets
import pytest
from datasets import Dataset
from paths import ROOT
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import hf_phibalance as phb
from hf_phibalance.balancing.counts import COLUMNS
from hf_phibalance.cli import main
from hf_phibalance.models import train_tokenizer
from hf_phibalance.tasks import make_splits


README = (ROOT / "README.md").read_text(encoding="utf-8")
BASE = "Qwen/Qwen3-30B-A3B"
CHAT = "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"


def block(language, containing):
    (code,) = [code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if containing in code]
    return code


def test_fits_a_screen_or_two():
    assert len(README.splitlines()) <= 200
    lines = [line for line in block("python", "SFTTrainer").splitlines() if line]
    assert len(lines) == 9


def test_table_of_the_log_has_all_keys():
    keys = re.findall(r"^\| `(\w+)` \|", README.split("## What the log says")[1].split("\n## ")[0], re.MULTILINE)
    assert len(keys) == 10 and set(COLUMNS) < set(keys)


def test_memory_is_that_of_the_recipes():
    figures = re.search(r"\| `qwen3-30b-a3b` \| 30.*", (ROOT / "recipes/README.md").read_text())[0].split(" | ")
    assert f"{figures[4]} GiB for weights, adapters and optimizer" in README


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a tiny model of the quick start's family; its data stand for those of the Hub."""
    rows = [
        {"messages": [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in make_splits(48)["train"]
    ]
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = train_tokenizer([*texts, "<user>\n<assistant>\n"], vocab_size=400)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model("qwen3_moe", vocab_size=len(tokenizer)).bfloat16().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: Dataset.from_list(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow  # the export starts a process
def test_quick_start_trains_saves_and_merges(place, caplog, capsys, monkeypatch):
    """The blocks as printed, but for the name of the model and what makes the run short."""
    said = []
    for name in ("warning", "warning_once"):
        for room in ("attaching", "callback"):
            logger = __import__(f"hf_phibalance.training.{room}", fromlist=["logger"]).logger
            monkeypatch.setattr(logger, name, lambda text, *args: said.append(str(text)))
    code = block("python", "SFTTrainer").replace(BASE, "model")
    assert code.count("learning_rate=5e-5") == 1
    code = code.replace("learning_rate=5e-5", "learning_rate=5e-5, max_steps=2, logging_steps=1, use_cpu=True")
    names = {}
    exec(code, names)
    first, second, third = block("text", "φ-balancing is on").splitlines()
    layers = json.loads((ROOT / "recipes/qwen3-30b-a3b/config.json").read_text())["num_hidden_layers"]
    assert second.count(f"{layers} lora") == 2
    routers = len(phb.get_balancer(names["model"]).sites)
    assert said[0] == first and said[1].splitlines()[0] == second.replace(str(layers), str(routers))
    logged = names["trainer"].state.log_history[1]
    assert set(re.findall(r"'([\w/]+)'", third)) <= set(logged) and logged["moe/balance_loss"] != 0

    exec(block("python", "trainer.save_model()"), names)
    assert (place / "out/phi_balance.state").is_file() and phb.get_balancer(names["model"]).steps == 2
    export, serve = block("bash", "phibalance export").splitlines()
    assert main(shlex.split(export.split("#")[0])[1:]) == 0 and serve.startswith("vllm serve merged")
    assert type(AutoModelForCausalLM.from_pretrained("merged")).__name__ == "Qwen3MoeForCausalLM"
