"""Runs every command of the small models on real data in order: short trainings, then their evaluation."""

import gzip
import json
import os
import re
import shlex

import pytest
from forked import run_script
from paths import ROOT
from task_rows import HUMANEVAL, write

from hf_phibalance.tasks import make_splits


pytestmark = pytest.mark.slow

SHORT = "--max_steps 2 --train_problems 16 --test_problems 4 --validation_problems 4 --max_new_tokens 4"


def commands():
    text = (ROOT / "recipes" / "small-cpu" / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


@pytest.fixture
def data(tmp_path):
    """Made-up data at the paths that the commands name."""
    folder = tmp_path / "path" / "to"
    for split, rows in make_splits(100, 4, 4).items():
        write(folder / "gsm8k" / f"{split}.jsonl", rows)
    rows = [
        {
            "task_id": 601 + i,
            "text": f"Write a function to add {i} to a number.",
            "code": f"def add_{i}(number):\n    return number + {i}",
            "test_list": [f"assert add_{i}(1) == {i + 1}"],
        }
        for i in range(150)
    ]
    write(folder / "mbpp" / "mbpp.jsonl", rows)
    with gzip.open(folder / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(HUMANEVAL) + "\n")
    return tmp_path


def test_commands_of_the_readme(data):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    readme = commands()
    assert len(readme) == 4
    for words in readme:
        given = [ROOT / word if word.endswith(".yaml") else word for word in words[2:]]
        given += SHORT.split() if words[1] == "recipes/sft.py" else []
        done = run_script(ROOT / words[1], *given, cwd=data, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        output = next((word for word in words if word.endswith(".json")), None)
        assert output is None or json.loads((data / output).read_text())["metrics"]
    assert list(data.glob("results/small-cpu/*/metrics.json"))
