"""Rows from files and from the Hub: splits, and malformed rows with their line numbers."""

import gzip
import json
import random

import pytest
from task_rows import GSM8K, HUMANEVAL, MBPP, write

from hf_phibalance.tasks import load_rows, loading, make_splits


def test_gsm8k_from_files(tmp_path):
    splits = make_splits(12, 3, 5)
    for split, rows in splits.items():
        write(tmp_path / f"{split}.jsonl", ["", *rows])  # blank lines are nothing
    zipped = tmp_path / "zipped" / "train.jsonl.gz"
    zipped.parent.mkdir()
    zipped.write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "train.jsonl").read_bytes().lstrip()))
    for source in (tmp_path, tmp_path / "train.jsonl", zipped, zipped.parent):
        assert load_rows("gsm8k", str(source)) == splits["train"]
        assert load_rows("gsm8k", str(source), limit=4) == splits["train"][:4]
    assert load_rows("gsm8k", str(tmp_path), "validation") == splits["validation"]
    assert load_rows("gsm8k", str(tmp_path), "test", limit=2) == splits["test"][:2]


@pytest.mark.parametrize("name", ["mbpp", "mbpp/mbpp.jsonl"])
def test_mbpp_is_split_by_task_id(tmp_path, name):
    numbers = [1, 10, 11, 510, 511, 600, 601, 974]
    write(tmp_path / "mbpp" / "mbpp.jsonl", [MBPP | {"task_id": number} for number in numbers])
    found = [
        [row["task_id"] for row in load_rows("mbpp", str(tmp_path / name), split)]
        for split in ("prompt", "test", "validation", "train", "all")
    ]
    assert found == [[1, 10], [11, 510], [511, 600], [601, 974], numbers]
    write(tmp_path / "mbpp" / "mbpp.jsonl", [MBPP | {"task_id": 12}])
    with pytest.raises(ValueError, match=r"nothing is left of the 1 rows for split 'train' of mbpp.*split='all'"):
        load_rows("mbpp", str(tmp_path / name))


def test_hub_names_go_to_datasets(monkeypatch):
    import datasets

    asked = []
    test_problem = {"question": "How many are four and five of them?", "answer": "#### 9"}

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if split == "test":
            return datasets.Dataset.from_list([test_problem])
        rows = [GSM8K, GSM8K | {"answer": "5"}, test_problem] if "gsm8k" in name else [MBPP]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"1 of 3 rows.*\n  row 1: its answer has no '#### <number>'"):
        load_rows("gsm8k", "openai/gsm8k")
    assert load_rows("gsm8k", "someone/gsm8k-like:plain", bad_rows="skip") == [GSM8K]
    assert load_rows("mbpp", "google-research-datasets/mbpp", "all") == [MBPP]
    assert asked == [
        ("openai/gsm8k", "main", "test"),  # so that none of it is trained on
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", "main", "test"),
        ("someone/gsm8k-like", "plain", "train"),
        ("google-research-datasets/mbpp", "full", "prompt+test+validation+train"),
    ]


def test_hub_failure_says_what_was_tried(monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'nobody/nothing' is no local file.*ConnectionError: no network"):
        load_rows("gsm8k", "nobody/nothing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "arc"}, ValueError, "task='arc' is unknown: use one of gsm8k, mbpp, humaneval"),
        ({"split": "dev"}, ValueError, "split='dev': gsm8k has train, validation, test"),
        ({"task": "humaneval"}, ValueError, "humaneval has test. It is for evaluation only"),
        ({"bad_rows": "keep"}, ValueError, "bad_rows='keep': use 'refuse' or 'skip'"),
        ({"limit": 0}, ValueError, "limit=0: use a positive number"),
        ({"source": "./nowhere"}, FileNotFoundError, "'./nowhere' does not exist"),
        ({"source": "nowhere.jsonl"}, FileNotFoundError, "'nowhere.jsonl' does not exist"),
        ({"source": "{tmp}"}, FileNotFoundError, r"holds none of train\.jsonl, train\.jsonl\.gz"),
        ({"source": "{tmp}/empty.jsonl"}, ValueError, "nothing is left of the 0 rows"),
        ({"source": "{tmp}/cut.jsonl.gz"}, ValueError, r"cut\.jsonl\.gz cannot be read beyond line \d+.*anew"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, error, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    lines = [json.dumps({"question": str(random.Random(i).random()), "answer": "#### 1"}) for i in range(999)]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-900])
    arguments = {"task": "gsm8k", "source": "toy/none", **arguments}
    arguments["source"] = arguments["source"].replace("{tmp}", str(tmp_path))
    with pytest.raises(error, match=message):
        load_rows(arguments.pop("task"), arguments.pop("source"), **arguments)


BAD = {
    "gsm8k": [
        ('{"question": "What', "it is not JSON"),
        ("[1, 2]", "it is not a JSON object"),
        ({"question": "What?"}, "it has no answer"),
        ({"question": 3, "answer": "#### 1"}, "its question is int, not str"),
        ({"question": None, "answer": "#### 1"}, "its question is NoneType, not str"),
        ({"question": " \n", "answer": "#### 1"}, "its question is empty"),
        ({"question": "What?", "answer": "It is 1."}, "its answer has no '#### <number>'"),
        ({"question": "What?", "answer": "#### "}, "its answer has no '#### <number>'"),
    ],
    "mbpp": [
        (MBPP | {"code": "def f(:\n  pass"}, "its code does not compile"),
        (MBPP | {"code": "def f():\n  return '\0'"}, "its code does not compile"),
        (MBPP | {"task_id": "601"}, "its task_id is str, not int"),
        (MBPP | {"task_id": True}, "its task_id is bool, not int"),
        (MBPP | {"test_list": []}, "its test_list is empty"),
        (MBPP | {"test_list": [1]}, "its test_list holds something that is not text"),
        (MBPP | {"test_list": ["largest(1)"]}, "its first test is not one assert"),
        (MBPP | {"test_list": ["assert smallest(1) == 1"]}, "calls no function that its code defines"),
        (MBPP | {"code": 'def largest(a, b=2):\n  """Only words."""'}, "its function largest has no body"),
    ],
    "humaneval": [
        (HUMANEVAL | {"entry_point": ""}, "its entry_point is empty"),
        (HUMANEVAL | {"canonical_solution": "  return ("}, "does not compile"),
    ],
}
GOOD = {"gsm8k": GSM8K, "mbpp": MBPP, "humaneval": HUMANEVAL}
CASES = [(task, row, message) for task, cases in BAD.items() for row, message in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "row", "message"), CASES)
def test_malformed_rows_are_refused_or_skipped(tmp_path, warned, task, row, message):
    source = write(tmp_path / "rows.jsonl", [GOOD[task], "", row, GOOD[task]])
    split = "test" if task == "humaneval" else "train"
    with pytest.raises(ValueError) as refused:
        load_rows(task, source, split)
    assert f"1 of 3 rows cannot be used for {task}:\n  rows.jsonl, line 3: " in str(refused.value)
    assert message in str(refused.value) and "bad_rows='skip'" in str(refused.value)
    assert not warned.lines
    assert load_rows(task, source, split, bad_rows="skip") == [GOOD[task]] * 2
    (line,) = warned.lines
    assert "skipped 1 of 3 rows" in line and "rows.jsonl, line 3" in line and message in line


def test_the_first_few_of_many_are_shown(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "\xff\xfe", "answer": "#### 1"}\n' + b"{}\n" * 20 + json.dumps(GSM8K).encode())
    with pytest.raises(ValueError) as refused:
        load_rows("gsm8k", str(path))
    lines = str(refused.value).splitlines()
    assert "21 of 22 rows" in lines[0] and "line 1: it is not JSON: 'utf-8' codec" in lines[1]
    assert len(lines) == 1 + loading.SHOWN_BAD_ROWS + 1 + 1 and lines[-2] == "  ... and 16 more"
