"""Test problems kept out of training, by fingerprints of which the package ships those of GSM8K and HumanEval."""

import ast
import gzip
import json
import random
import subprocess
from pathlib import Path

import pytest
from paths import DATA
from task_rows import HUMANEVAL, MBPP, needs_data, write

from hf_phibalance.tasks import contamination, drop_contaminated, load_rows, make_splits
from hf_phibalance.tasks.fingerprints import write_fingerprints
from hf_phibalance.tasks.table import MBPP_SPLITS


PROBLEM = (
    "In a faraway village seven bakers each bake twelve loaves, sell nine of them before noon, and give the remaining "
    "ones to the school. How many loaves does the school receive?"
)


@pytest.fixture
def fingerprints(tmp_path, monkeypatch):
    """Fingerprints of made-up test problems in place of the shipped ones."""
    solution = (
        "    total = 0\n    for number in sequence:\n        if number > limit:\n            total += number ** 2\n"
    )
    humaneval = HUMANEVAL | {
        "prompt": 'def add_large(sequence, limit):\n    """ Sum the squares of all those numbers of a sequence that are '
        'larger than a limit.\n    >>> add_large([1, 3], 2)\n    9\n    """\n',
        "entry_point": "add_large",
        "canonical_solution": solution + "    return total\n",
    }
    sources = {
        "gsm8k": write(
            tmp_path / "made" / "gsm8k.jsonl", [{"question": PROBLEM, "answer": "7*3=<<7*3=21>>21\n#### 21"}]
        ),
        "humaneval": write(tmp_path / "made" / "humaneval.jsonl", [humaneval]),
    }
    write_fingerprints(sources, tmp_path / "made" / "fingerprints.json")
    monkeypatch.setattr(contamination, "FINGERPRINTS", tmp_path / "made" / "fingerprints.json")
    contamination.shipped_fingerprints.cache_clear()
    yield humaneval
    contamination.shipped_fingerprints.cache_clear()


def test_normalisation():
    assert contamination.normalise("Ｍia’s  ½-Price: 2+3=<<2+3=5>>5\n_É_!") == [
        "mia",
        "s",
        "1",
        "2",
        "price",
        "2",
        "3",
        "5",
        "é",
    ]


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
    kept, dropped = drop_contaminated([chat, *rows], "gsm8k")
    assert (kept, dropped) == (rows, [chat])


def test_humaneval_never_enters_training(fingerprints):
    solved = "def other(sequence, limit):\n" + fingerprints["canonical_solution"]
    described = "Sum the squares of all those numbers of a sequence that are larger than a limit."
    rows = [
        MBPP | {"code": solved},
        MBPP | {"text": f"Write a function. {described}"},
        {"prompt": fingerprints["prompt"]},
        {"anything": [fingerprints["prompt"], fingerprints["canonical_solution"]]},
    ]
    assert drop_contaminated([*rows, MBPP], "mbpp") == ([MBPP], rows)
    assert drop_contaminated([MBPP], "humaneval") == ([], [MBPP])


def test_test_problems_beside_the_training_rows(tmp_path, fingerprints, warned):
    rows = make_splits(6, 0, 3)
    write(tmp_path / "test.jsonl", [*rows["test"], "broken"])
    write(tmp_path / "train.jsonl", [rows["train"][0], rows["test"][1], *rows["train"][1:]])
    assert load_rows("gsm8k", str(tmp_path)) == rows["train"]
    assert "line 2 (gsm8k)" in warned.lines[0]
    assert load_rows("gsm8k", str(tmp_path / "train.jsonl"))[1] == rows["test"][1]  # nothing lies beside it


def test_fingerprints_survive_their_file_and_hold_no_text(tmp_path, fingerprints):
    written = (tmp_path / "made" / "fingerprints.json").read_text()
    assert "bakers" not in written and "squares" not in written
    again = contamination.Fingerprints.from_json(written)
    assert again.find({"text": PROBLEM}) == "gsm8k" and again.find({"text": PROBLEM[:90]}) is None
    assert again.copy().to_json({"gsm8k": 1, "humaneval": 2}) == again.to_json({"gsm8k": 1, "humaneval": 2})
    with pytest.raises(ValueError, match="first_words=9"):
        contamination.Fingerprints.from_json(json.dumps(json.loads(written) | {"first_words": 9}))


@needs_data
def test_shipped_fingerprints_know_the_real_test_problems():
    for task, folder in (("gsm8k", "gsm8k"), ("humaneval", "humaneval")):
        rows = load_rows(task, str(DATA / folder), "test")
        assert len(rows) == {"gsm8k": 1000, "humaneval": 164}[task]
        column = {"gsm8k": "question", "humaneval": "prompt"}[task]
        wrapped = [{"text": f"Solve this problem. {row[column]} Be brief."} for row in rows]
        assert drop_contaminated(wrapped, "gsm8k") == ([], wrapped)


@needs_data
def test_shipped_fingerprints_are_those_of_the_real_test_problems(tmp_path):
    sources = {name: str(DATA / name) for name in ("gsm8k", "humaneval")}
    write_fingerprints(sources, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == contamination.FINGERPRINTS.read_text()


@needs_data
def test_real_training_rows_are_kept():
    assert len(load_rows("gsm8k", str(DATA / "gsm8k"))) == 7473
    assert [len(load_rows("mbpp", str(DATA / "mbpp"), split)) for split in MBPP_SPLITS] == [
        10,
        500,
        90,
        374,
        974,
    ]
    texts = [Path(module.__file__).read_text() for module in (ast, gzip, json, random, subprocess)]
    assert drop_contaminated([{"text": text} for text in texts], "mbpp")[1] == []
