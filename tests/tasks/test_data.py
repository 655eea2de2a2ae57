"""`hf_phibalance.data`: splits, forms, malformed rows with their line numbers, and test problems kept out of training."""

import ast
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from paths import DATA

from hf_phibalance.tasks import data, toy


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data sets")
GSM8K = {"question": "Mia has 2 pens and buys 3. How many has she?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
MBPP = {
    "task_id": 601,
    "text": 'Write a function to find the "largest" of \\two numbers.',
    "code": "import math\r\nBASE = 0\r\ndef helper(x):\r\n\treturn x # no change\r\n"
    'def largest(a, b=2):\r\n  """Old words."""\r\n  if a > b:\r\n    return(helper(a))\r\n  return b',
    "test_list": ["assert largest(1, 5) == 5", "assert largest(7) == 7"],
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """ Return 1 """\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
PROBLEM = (
    "In a faraway village seven bakers each bake twelve loaves, sell nine of them before noon, and give the remaining "
    "ones to the school. How many loaves does the school receive?"
)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


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
    data.write_fingerprints(sources, tmp_path / "made" / "fingerprints.json")
    monkeypatch.setattr(data, "FINGERPRINTS", tmp_path / "made" / "fingerprints.json")
    data.shipped_fingerprints.cache_clear()
    yield humaneval
    data.shipped_fingerprints.cache_clear()


# ---------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", ["folder", "file", "gzip"])
def test_gsm8k_from_files(tmp_path, name):
    splits = toy.make_splits(12, 3, 5)
    for split, rows in splits.items():
        write(tmp_path / f"{split}.jsonl", ["", *rows])  # blank lines are nothing
    source = {"folder": tmp_path, "file": tmp_path / "train.jsonl", "gzip": tmp_path / "zipped" / "train.jsonl.gz"}[
        name
    ]
    if name == "gzip":
        source.parent.mkdir()
        source.write_bytes(gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "train.jsonl").read_bytes().lstrip()))
    assert data.load_rows("gsm8k", str(source)) == splits["train"]
    assert data.load_rows("gsm8k", str(source), limit=4) == splits["train"][:4]
    if name == "folder":
        assert data.load_rows("gsm8k", str(source), "validation") == splits["validation"]
        assert data.load_rows("gsm8k", str(source), "test", limit=2) == splits["test"][:2]
    if name == "gzip":
        assert data.load_rows("gsm8k", str(source.parent)) == splits["train"]


@pytest.mark.parametrize("name", ["mbpp", "mbpp/mbpp.jsonl"])
def test_mbpp_is_split_by_task_id(tmp_path, name):
    numbers = [1, 10, 11, 510, 511, 600, 601, 974]
    write(tmp_path / "mbpp" / "mbpp.jsonl", [MBPP | {"task_id": number} for number in numbers])
    found = {
        split: [row["task_id"] for row in data.load_rows("mbpp", str(tmp_path / name), split)]
        for split in data.MBPP_SPLITS
    }
    assert found == {
        "prompt": [1, 10],
        "test": [11, 510],
        "validation": [511, 600],
        "train": [601, 974],
        "all": numbers,
    }
    write(tmp_path / "mbpp" / "mbpp.jsonl", [MBPP | {"task_id": 12}])
    with pytest.raises(ValueError, match=r"nothing is left of the 1 rows for split 'train' of mbpp.*split='all'"):
        data.load_rows("mbpp", str(tmp_path / name))


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
        data.load_rows("gsm8k", "openai/gsm8k")
    assert data.load_rows("gsm8k", "someone/gsm8k-like:plain", bad_rows="skip") == [GSM8K]
    assert data.load_rows("mbpp", "google-research-datasets/mbpp", "all") == [MBPP]
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
        data.load_rows("gsm8k", "nobody/nothing")


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
    lines = "".join(
        json.dumps({"question": str(random.Random(i).random()), "answer": "#### 1"}) + "\n" for i in range(999)
    )
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-900])
    arguments = {"task": "gsm8k", "source": "toy/none", **arguments}
    arguments["source"] = arguments["source"].replace("{tmp}", str(tmp_path))
    with pytest.raises(error, match=message):
        data.load_rows(arguments.pop("task"), arguments.pop("source"), **arguments)


# ---------------------------------------------------------------------- malformed rows

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


@pytest.mark.parametrize(("task", "row", "message"), CASES)
def test_malformed_rows_are_refused_or_skipped(tmp_path, warned, task, row, message):
    source = write(tmp_path / "rows.jsonl", [GOOD[task], "", row, GOOD[task]])
    split = "test" if task == "humaneval" else "train"
    with pytest.raises(ValueError) as refused:
        data.load_rows(task, source, split)
    assert f"1 of 3 rows cannot be used for {task}:\n  rows.jsonl, line 3: " in str(refused.value)
    assert message in str(refused.value) and "bad_rows='skip'" in str(refused.value)
    assert not warned.lines
    assert data.load_rows(task, source, split, bad_rows="skip") == [GOOD[task]] * 2
    (line,) = warned.lines
    assert "skipped 1 of 3 rows" in line and "rows.jsonl, line 3" in line and message in line


def test_the_first_few_of_many_are_shown(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"question": "\xff\xfe", "answer": "#### 1"}\n' + b"{}\n" * 20 + json.dumps(GSM8K).encode())
    with pytest.raises(ValueError) as refused:
        data.load_rows("gsm8k", str(path))
    lines = str(refused.value).splitlines()
    assert "21 of 22 rows" in lines[0] and "line 1: it is not JSON: 'utf-8' codec" in lines[1]
    assert len(lines) == 1 + data.SHOWN_BAD_ROWS + 1 + 1 and lines[-2] == "  ... and 16 more"


# ---------------------------------------------------------------------- forms


def test_mbpp_is_put_as_humaneval_puts_it():
    task = data.TASKS["mbpp"]
    assert task.prompt(MBPP) == (
        "import math\nBASE = 0\n\ndef helper(x):\n    return x\n\n\n"
        'def largest(a, b=2):\n    """ Write a function to find the "largest" of \\\\two numbers.\n'
        '    >>> largest(1, 5)\n    5\n    """\n'
    )
    assert task.completion(MBPP) == "    if a > b:\n        return helper(a)\n    return b\n"
    docstring = ast.get_docstring(ast.parse(task.prompt(MBPP)).body[-1])
    assert docstring.splitlines()[0] == MBPP["text"]


@pytest.mark.parametrize(
    ("test", "example"),
    [
        ("assert not f(1)", ">>> not f(1)\n    True"),
        ("assert set(f('\"\"\"')) == {'a'}", ">>> set(f('\\\"\"\"'))\n    {'a'}"),
        ("assert math.isclose(f(1), 2.0)", ">>> math.isclose(f(1), 2.0)\n    True"),
    ],
)
def test_other_asserts_become_examples(test, example):
    row = MBPP | {"code": "@cache\ndef f(x):\n    def g():\n        return x\n    return g", "test_list": [test]}
    prompt, completion = data.TASKS["mbpp"].prompt(row), data.TASKS["mbpp"].completion(row)
    assert prompt.startswith('@cache\ndef f(x):\n    """ Write') and example in prompt
    assert completion == "    def g():\n        return x\n    return g\n"
    assert ast.get_docstring(ast.parse(prompt + completion).body[0]) is not None


@needs_data
def test_mbpp_still_passes_its_tests():
    rows = data.load_rows("mbpp", str(DATA / "mbpp"), "all")
    assert len(rows) == 974
    programs = []
    for row in rows[::9]:
        code = data.TASKS["mbpp"].prompt(row) + data.TASKS["mbpp"].completion(row)
        programs.append("\n".join([code, row["test_setup_code"], *row["test_list"]]))
    # the data set's own programs, in another process only because they may leave anything behind
    runner = "import json, sys\nfor program in json.load(sys.stdin): exec(program, {'__name__': 'row'})\nprint('done')"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", runner],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.endswith("done\n"), done.stderr


class ChatTokenizer:
    def __init__(self, content):
        self.chat_template = "<{role}>" + content

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, messages, tokenize):
        strip = "strip" in self.chat_template
        return "".join(f"<{m['role']}>{m['content'].strip() if strip else m['content']}" for m in messages)


def test_datasets_for_trl(warned):
    plain = data.to_sft_dataset("gsm8k", [GSM8K])
    assert plain.to_list() == [
        {"prompt": f"Question: {GSM8K['question']}\nAnswer:", "completion": f" {GSM8K['answer']}"}
    ]
    (chat,) = data.to_sft_dataset("gsm8k", [GSM8K], ChatTokenizer("{content | strip}")).to_list()
    assert chat["prompt"] == [{"role": "user", "content": plain[0]["prompt"]}]
    assert chat["completion"] == [{"role": "assistant", "content": GSM8K["answer"]}]
    (chat,) = data.to_sft_dataset("mbpp", [MBPP], ChatTokenizer("{content}")).to_list()
    assert chat["completion"][0]["content"] == data.TASKS["mbpp"].completion(MBPP)
    assert not warned.lines
    (code,) = data.to_sft_dataset("mbpp", [MBPP], ChatTokenizer("{content | strip}")).to_list()
    assert code == {"prompt": data.TASKS["mbpp"].prompt(MBPP), "completion": data.TASKS["mbpp"].completion(MBPP)}
    assert warned.about("The chat template changes the completions of mbpp")
    with pytest.raises(ValueError, match="no rows of gsm8k"):
        data.to_sft_dataset("gsm8k", [])
    with pytest.raises(ValueError, match="humaneval is for evaluation only"):
        data.to_sft_dataset("humaneval", [HUMANEVAL])


def test_trl_trains_the_completion_only(tmp_path):
    from trl import SFTConfig, SFTTrainer

    code = data.TASKS["mbpp"].prompt(MBPP) + data.TASKS["mbpp"].completion(MBPP)
    tokenizer = toy.train_tokenizer([GSM8K["question"], GSM8K["answer"], *[code] * 50])
    alone = tokenizer(data.TASKS["mbpp"].prompt(MBPP))["input_ids"]
    assert tokenizer(code)["input_ids"][: len(alone)] != alone  # merges the line break and the indentation
    fields = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = toy.build_model("llama", fields | {"num_key_value_heads": 2}, tokenizer)
    args = SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, max_length=None)
    for task, row in (("gsm8k", GSM8K), ("mbpp", MBPP)):
        dataset = data.to_sft_dataset(task, [row], tokenizer)
        trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        trained = batch["input_ids"][batch["labels"] != -100]
        prompt = tokenizer(data.TASKS[task].prompt(row))["input_ids"]
        assert batch["input_ids"][0, : len(prompt)].tolist() == prompt  # what generation will start from
        assert tokenizer.decode(trained) == data.TASKS[task].completion(row) + tokenizer.eos_token
        assert tokenizer.decode(batch["input_ids"][batch["labels"] == -100]) == data.TASKS[task].prompt(row)


# ---------------------------------------------------------------------- contamination


def test_normalisation():
    assert data.normalise("Ｍia’s  ½-Price: 2+3=<<2+3=5>>5\n_É_!") == [
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
    rows = data.load_rows("gsm8k", source)
    assert [row["question"] for row in rows] == [questions[0], altered]
    (line,) = warned.lines
    assert "left out 2 of 4 rows" in line and "line 2 (gsm8k)" in line and "line 3 (gsm8k)" in line
    assert len(data.load_rows("gsm8k", source, "test")) == 4  # to be examined on
    chat = {"messages": [{"role": "user", "content": wrapped}, {"role": "assistant", "content": "21"}]}
    kept, dropped = data.drop_contaminated([chat, *rows], "gsm8k")
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
    assert data.drop_contaminated([*rows, MBPP], "mbpp") == ([MBPP], rows)
    assert data.drop_contaminated([MBPP], "humaneval") == ([], [MBPP])


def test_test_problems_beside_the_training_rows(tmp_path, fingerprints, warned):
    rows = toy.make_splits(6, 0, 3)
    write(tmp_path / "test.jsonl", [*rows["test"], "broken"])
    write(tmp_path / "train.jsonl", [rows["train"][0], rows["test"][1], *rows["train"][1:]])
    assert data.load_rows("gsm8k", str(tmp_path)) == rows["train"]
    assert "line 2 (gsm8k)" in warned.lines[0]
    assert data.load_rows("gsm8k", str(tmp_path / "train.jsonl"))[1] == rows["test"][1]  # nothing lies beside it


def test_fingerprints_survive_their_file_and_hold_no_text(tmp_path, fingerprints):
    written = (tmp_path / "made" / "fingerprints.json").read_text()
    assert "bakers" not in written and "squares" not in written
    again = data.Fingerprints.from_json(written)
    assert again.find({"text": PROBLEM}) == "gsm8k" and again.find({"text": PROBLEM[:90]}) is None
    assert again.copy().to_json({"gsm8k": 1, "humaneval": 2}) == again.to_json({"gsm8k": 1, "humaneval": 2})
    with pytest.raises(ValueError, match="first_words=9"):
        data.Fingerprints.from_json(json.dumps(json.loads(written) | {"first_words": 9}))


@needs_data
def test_shipped_fingerprints_know_the_real_test_problems():
    for task, folder in (("gsm8k", "gsm8k"), ("humaneval", "humaneval")):
        rows = data.load_rows(task, str(DATA / folder), "test")
        assert len(rows) == {"gsm8k": 1000, "humaneval": 164}[task]
        column = {"gsm8k": "question", "humaneval": "prompt"}[task]
        wrapped = [{"text": f"Solve this problem. {row[column]} Be brief."} for row in rows]
        assert data.drop_contaminated(wrapped, "gsm8k") == ([], wrapped)


@needs_data
def test_shipped_fingerprints_are_those_of_the_real_test_problems(tmp_path):
    sources = {name: str(DATA / name) for name in ("gsm8k", "humaneval")}
    data.write_fingerprints(sources, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == data.FINGERPRINTS.read_text()


@needs_data
def test_real_training_rows_are_kept():
    assert len(data.load_rows("gsm8k", str(DATA / "gsm8k"))) == 7473
    assert [len(data.load_rows("mbpp", str(DATA / "mbpp"), split)) for split in data.MBPP_SPLITS] == [
        10,
        500,
        90,
        374,
        974,
    ]
    texts = [Path(module.__file__).read_text() for module in (ast, gzip, json, random, subprocess)]
    assert data.drop_contaminated([{"text": text} for text in texts], "mbpp")[1] == []
