"""Every code block of README.md and of the pages runs as printed: here, or in the test that is named here."""

import json
import os
import re
import shlex
from itertools import pairwise

import pytest
from forked import run_script
from paths import ROOT
from tiny import tiny_model

from hf_phibalance.models import train_tokenizer
from hf_phibalance.tasks import make_splits


PAGES = [ROOT / "README.md", *sorted((ROOT / "recipes").glob("**/*.md"))]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}

# Tests of blocks by their page and a piece of their text. Those in `integrations` run in environments of nox.
TESTED_ELSEWHERE = {
    ("README.md", "pip install"): ".ci/run",
    ("README.md", "SFTTrainer"): "tests/test_readme.py",
    ("README.md", "PhiBalancePlugin"): "tests/integrations/test_axolotl.py",
    ("README.md", "swift"): "tests/integrations/test_swift.py",
    ("README.md", "llamafactory"): "tests/integrations/test_llamafactory.py",
    ("README.md", "phi_balance:\n  coef"): "tests/integrations/test_llamafactory.py",
    ("README.md", "import Accelerator"): "tests/integrations/test_own_loops.py",
    ("README.md", "import lightning"): "tests/integrations/test_own_loops.py",
    ("README.md", "vllm.entrypoints"): "tests/integrations/test_vllm.py",
    ("recipes/README.md", "recipes/sft.py"): "tests/recipes/test_recipes.py",
    ("recipes/small-cpu/README.md", "recipes/sft.py"): "tests/recipes/test_small_recipes.py",
    ("recipes/tiny-cpu/README.md", "recipes/sft.py"): "tests/recipes/test_recipe_sft.py",
    ("recipes/compare/README.md", "compare.py"): "tests/recipes/test_compare.py",
    ("recipes/compare/FINETUNING.md", "compare.py"): "tests/recipes/test_compare.py",
}
HERE = ("recipes/evaluate.py", "phibalance inspect", "phibalance export")


def blocks():
    """`(page, code)` of all fenced blocks."""
    for page in PAGES:
        for code in re.findall(r"```\w+\n(.*?)```", page.read_text(), re.DOTALL):
            yield page.relative_to(ROOT).as_posix(), code


def test_every_block_is_run_by_a_test():
    unused = set(TESTED_ELSEWHERE)
    for page, code in blocks():
        found = [key for key in TESTED_ELSEWHERE if key[0] == page and key[1] in code]
        assert found or any(command in code for command in HERE), f"no test runs this block of {page}:\n{code}"
        unused -= set(found)
    assert not unused, "no such block"
    for test in TESTED_ELSEWHERE.values():
        assert (ROOT / test).is_file(), test


def commands(part):
    """Lines of blocks with `part`, as printed in README.md."""
    return [
        line for page, code in blocks() if page == "README.md" for line in code.splitlines() if line.startswith(part)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name: a model with a selection bias, data, and sources."""
    import torch

    import hf_phibalance as phb

    folder = tmp_path_factory.mktemp("place")
    splits = make_splits(40, 0, 8)
    text = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in splits["train"]]
    tokenizer = train_tokenizer([*text, (ROOT / "recipes" / "sft.py").read_text()], vocab_size=400)
    model = phb.patch(
        tiny_model("mixtral", vocab_size=len(tokenizer), max_position_embeddings=2048), {"bias_coef": 0.01}
    )
    balancer = phb.get_balancer(model)
    balancer.set_biases({name: 0.01 * torch.arange(8.0) for name in balancer.layer_names})
    for name in ("results/tiny-cpu/mixtral", "results/mine", "results/x"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        rows = splits[split]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("recipes", "hf_phibalance"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "src").symlink_to(ROOT / "hf_phibalance" / "maths")
    return folder


@pytest.mark.parametrize("line", commands("phibalance "))
def test_commands_of_the_package(line, place):
    (place / "phibalance.py").write_text("from hf_phibalance.cli import main\n\nraise SystemExit(main())\n")
    words = shlex.split(line)
    extra = ["--max_loss_increase", "100"] if words[1] == "export" else []  # of a model that has learnt nothing
    done = run_script(place / "phibalance.py", *words[1:], *extra, cwd=place, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    for option, file in pairwise(words):
        assert option not in ("--html", "--json") or (place / file).is_file()


@pytest.mark.parametrize("line", [line for line in commands("python recipes/evaluate.py") if "vllm" not in line])
def test_evaluations(line, place):
    """The Hub's datasets are out of reach in the tests: local files stand for them."""
    words = shlex.split(line)
    problem = {"task_id": "x", "prompt": "def f(x):\n", "entry_point": "f", "test": "def check(f):\n    assert f(1)\n"}
    (place / "HumanEval.jsonl").write_text(json.dumps(problem) + "\n")
    data = place / ("HumanEval.jsonl" if "humaneval" in words else "gsm8k")
    short = ["--dataset_path", data, "--max_new_tokens", 8, "--limit", 2, "--num_threads", 1]
    done = run_script(ROOT / "recipes" / "evaluate.py", *words[2:], *short, cwd=place, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|phb_" in done.stdout and list((place / "results/x/eval").glob("results_*.json"))
