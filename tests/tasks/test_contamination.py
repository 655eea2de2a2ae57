"""Test problems stay out of training. The package ships fingerprints of those of GSM8K and HumanEval."""

import ast
import gzip
import json
import random
import subprocess
from pathlib import Path

import pytest
from paths import DATA
from task_rows import HUMANEVAL, MBPP, needs_data, write

from hf_phibalance.tasks import TASKS, contamination, load_rows, make_splits
from hf_phibalance.tasks.table import MBPP_SPLITS


PROBLEM = (
    "In a faraway village seven bakers each bake twelve loaves, sell nine of them before noon, and give the remaining "
    "ones to the school. How many loaves does the school receive?"
)


def write_fingerprints(problems, path):
    """Writes the file of fingerprints from the rows of the test split of each benchmark."""
    content = {
        name: {
            "dataset": TASKS[name].hub_name,
            "problems": len(rows),
            "entries": sorted(contamination.fingerprints_of(name, rows)),
        }
        for name, rows in problems.items()
    }
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def found_in(rows):
    """The rows that hold a test problem."""
    return [row for row in rows if contamination.shipped_fingerprints().find(row) is not None]


@pytest.fixture
def fingerprints(tmp_path, monkeypatch):
    """Fingerprints of invented test problems in place of the shipped ones."""
    humaneval = HUMANEVAL | {
        "prompt": 'def add_large(sequence, limit):\n    """ Sum the squares of all those numbers of a sequence that are '
        'larger than a limit.\n    >>> add_large([1, 3], 2)\n    9\n    """\n',
        "entry_point": "add_large",
        "canonical_solution": "    total = 0\n    for number in sequence:\n        if number > limit:\n"
        "            total += number ** 2\n    return total\n",
    }
    gsm8k = {"question": PROBLEM, "answer": "7*3=<<7*3=21>>21\n#### 21"}
    write_fingerprints({"gsm8k": [gsm8k], "humaneval": [humaneval]}, tmp_path / "made.json")
    assert "bakers" not in (tmp_path / "made.json").read_text()
    monkeypatch.setattr(contamination, "FINGERPRINTS", tmp_path / "made.json")
    contamination.shipped_fingerprints.cache_clear()
    yield humaneval
    contamination.shipped_fingerprints.cache_clear()


def test_normalisation():
    words = ["mia", "s", "1", "2", "price", "2", "3", "5", "é"]
    assert contamination.normalise("Ｍia’s  ½-Price: 2+3=<<2+3=5>>5\n_É_!") == words


def test_test_problems_never_enter_training(tmp_path, fingerprints, warned):
    shouted = PROBLEM.upper().replace(" ", "  ").replace(",", ";")
    wrapped = f"Below is a problem.\n\n### Problem\n{PROBLEM}\n### Think step by step."
    altered = PROBLEM.replace("twelve", "eleven")
    questions = ["What is 1 + 1?", shouted, wrapped, altered]
    source = write(tmp_path / "train.jsonl", [{"question": text, "answer": "#### 2"} for text in questions])
    rows = load_rows("gsm8k", source)
    assert [row["question"] for row in rows] == [questions[0], altered]
    (line,) = warned.lines
    assert "left out 2 of 4 rows" in line and "line 2 (gsm8k)" in line and "line 3 (gsm8k)" in line
    assert len(load_rows("gsm8k", source, "test")) == 4  # to be examined on
    chat = {"messages": [{"role": "user", "content": wrapped}, {"role": "assistant", "content": "21"}]}
    assert found_in([chat, *rows, {"text": PROBLEM[:90]}]) == [chat]


def test_humaneval_never_enters_training(fingerprints):
    solved = "def other(sequence, limit):\n" + fingerprints["canonical_solution"]
    described = "Sum the squares of all those numbers of a sequence that are larger than a limit."
    rows = [
        MBPP | {"code": solved},
        MBPP | {"text": f"Write a function. {described}"},
        {"prompt": fingerprints["prompt"]},
        {"anything": [fingerprints["prompt"], fingerprints["canonical_solution"]]},
    ]
    assert found_in([*rows, MBPP]) == rows


def test_test_problems_beside_the_training_rows(tmp_path, fingerprints, warned):
    rows = make_splits(6, 0, 3)
    write(tmp_path / "test.jsonl", [*rows["test"], "broken"])
    write(tmp_path / "train.jsonl", [rows["train"][0], rows["test"][1], *rows["train"][1:]])
    assert load_rows("gsm8k", str(tmp_path)) == rows["train"]
    assert "line 2 (gsm8k)" in warned.lines[0]
    assert load_rows("gsm8k", str(tmp_path / "train.jsonl"))[1] == rows["test"][1]  # nothing lies beside it


@needs_data
def test_shipped_fingerprints_are_those_of_the_real_test_problems(tmp_path):
    problems = {name: load_rows(name, str(DATA / name), "test") for name in ("gsm8k", "humaneval")}
    assert [len(rows) for rows in problems.values()] == [1000, 164]
    write_fingerprints(problems, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == contamination.FINGERPRINTS.read_text()
    for name, column in (("gsm8k", "question"), ("humaneval", "prompt")):
        wrapped = [{"text": f"Solve this problem. {row[column]} Be brief."} for row in problems[name]]
        assert found_in(wrapped) == wrapped


@pytest.mark.slow
@needs_data
def test_real_training_rows_are_kept():
    assert len(load_rows("gsm8k", str(DATA / "gsm8k"))) == 7473
    sizes = [len(load_rows("mbpp", str(DATA / "mbpp"), split)) for split in MBPP_SPLITS]
    assert sizes == [10, 500, 90, 374, 974]
    texts = [Path(module.__file__).read_text() for module in (ast, gzip, json, random, subprocess)]
    assert found_in([{"text": text} for text in texts]) == []
