# Copyright 2026 The hf_phibalance authors.
# SPDX-License-Identifier: Apache-2.0
"""The datasets of the recipes: GSM8K, MBPP and HumanEval, from JSON lines or from the Hub, as rows for training and
evaluation, checked line by line, and with the test problems kept out of what is trained on.

```python
from hf_phibalance import data

rows = data.load_rows("gsm8k", "path/to/gsm8k")  # or "openai/gsm8k"
dataset = data.to_sft_dataset("gsm8k", rows, tokenizer)  # columns prompt and completion
```

**Contamination.** Rows that hold a GSM8K test problem or a HumanEval problem are dropped from every split but `test`
(and MBPP's `test`, which is used for training, is checked as well). The package ships fingerprints of these problems,
not their text, in `fingerprints.json`: for every text (question and worked answer of GSM8K; description, docstring,
prompt, solution and tests of HumanEval) the number of its words and two hashes, one of its first words and one of all.
Words are runs of letters and digits of the NFKC form in lower case, without the `<<...>>` of GSM8K. A row is dropped if
one of its fields is such a text, or holds one of at least `MIN_EMBEDDED_WORDS` words. Paraphrases and problems with
other numbers are not found. The file covers what it was made from, the first 1,000 of the 1,319 test problems of
GSM8K and all of HumanEval. The others are added where they are at hand: from `test.jsonl` in the folder of the training
rows or, if these come from the Hub, from there. It is made by

```
python -m hf_phibalance.data gsm8k=path/to/gsm8k humaneval=path/to/HumanEval.jsonl.gz
```
"""

from __future__ import annotations

import ast
import base64
import functools
import gzip
import hashlib
import json
import re
import struct
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers.utils import logging


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)
Row = dict[str, Any]

SHOWN_BAD_ROWS = 5
FINGERPRINTS = Path(__file__).with_name("fingerprints.json")
WINDOW = 8  # words of a problem whose hash starts a comparison
MIN_WORDS = 4  # shorter texts are no evidence
MIN_EMBEDDED_WORDS = 12  # shorter ones are, but only as a whole field

# MBPP's splits by task_id, as published.
MBPP_SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
    "all": range(1, 975),
}


# ---------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """
    One dataset, and how a row of it is put to a model.

    Args:
        name (`str`): key in `TASKS`.
        hub_name (`str`): dataset on the Hub.
        hub_config (`str`, *optional*): its configuration there.
        columns (`dict[str, type]`): required fields of a row and their types; strings and lists must not be empty.
        files (`tuple[str, ...]`): usual names of the local file that holds all splits, or the only one.
        splits (`tuple[str, ...]`): splits that can be asked for.
        check (`Callable[[dict], str | None]`): what else is wrong with a row whose columns are right.
        prompt (`Callable[[dict], str]`): what the model is given.
        completion (`Callable[[dict], str]`): what it shall write, to be put right behind the prompt.
        texts (`Callable[[dict], list[str]]`): texts by which a problem of the test split is recognised.
        trains (`bool`, *optional*, defaults to `True`): whether there is anything to train on.
        ids (`dict[str, range]`, *optional*): `task_id`s of the splits of a file that holds them all.
    """

    name: str
    hub_name: str
    hub_config: str | None
    columns: Mapping[str, type]
    files: tuple[str, ...]
    splits: tuple[str, ...]
    check: Callable[[Row], str | None]
    prompt: Callable[[Row], str]
    completion: Callable[[Row], str]
    texts: Callable[[Row], list[str]]
    trains: bool = True
    ids: Mapping[str, range] | None = None


def _check_gsm8k(row: Row) -> str | None:
    if not re.search(r"#### -?[$0-9.,]*[0-9]", row["answer"]):
        return "its answer has no '#### <number>'"
    return None


def _check_mbpp(row: Row) -> str | None:
    if not all(isinstance(test, str) for test in row["test_list"]):
        return "its test_list holds something that is not text"
    try:
        _function_form(row)
    except _FormError as error:
        return str(error)
    return None


def _check_humaneval(row: Row) -> str | None:
    try:
        _parse(f"{row['prompt']}{row['canonical_solution']}\n{row['test']}", "its prompt with solution and test")
    except _FormError as error:
        return str(error)
    return None


class _FormError(ValueError):
    """Code cannot be read, or a row of MBPP cannot be written as a function to be completed."""


def _parse(code: str, what: str) -> ast.Module:
    """The syntax tree of code that is never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _FormError(f"{what} does not compile: {error}") from None


def _function_form(row: Row) -> tuple[str, str]:
    """
    A row of MBPP as HumanEval puts its problems: the prompt is a function up to the end of its docstring, the
    completion is the body.

    The function is the one that the first test calls. Its docstring is the row's text and the first test as an
    example; whatever else the row's code holds (imports, constants, helpers) comes before it. The code is written anew
    from its syntax tree, so the body has four spaces, `\\n` and no comments whatever the row's habits.
    """
    module = _parse(row["code"], "its code")
    tests = _parse(row["test_list"][0].strip(), "its first test").body
    if len(tests) != 1 or not isinstance(tests[0], ast.Assert):
        raise _FormError("its first test is not one assert")
    test = tests[0].test
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    calls = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
    names = [name.id for name in calls if isinstance(name, ast.Name) and name.id in functions]
    if not names:
        raise _FormError("its first test calls no function that its code defines")
    entry = functions[names[0]]

    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        example = [f">>> {ast.unparse(test.left)}", ast.unparse(test.comparators[0])]
    else:
        example = [f">>> {ast.unparse(test)}", "True"]
    text = [line.strip() for line in row["text"].strip().splitlines()]
    docstring = "\n    ".join([*text, *example]).replace("\\", "\\\\").replace('"""', '\\"""')

    if ast.get_docstring(entry, clean=False) is not None:
        entry.body = entry.body[1:]
    if not entry.body:
        raise _FormError(f"its function {entry.name} has no body")
    others = [node for node in module.body if node is not entry]
    whole, entry.body = ast.unparse(entry), [ast.Pass()]
    header = ast.unparse(entry).removesuffix("\n    pass")
    prompt = f'{header}\n    """ {docstring}\n    """\n'
    if others:
        prompt = f"{ast.unparse(ast.Module(others, []))}\n\n\n{prompt}"
    return prompt, whole.removeprefix(header).strip("\n") + "\n"


def _texts_of_gsm8k(row: Row) -> list[str]:
    return [row["question"], row["answer"]]


def _texts_of_humaneval(row: Row) -> list[str]:
    module = _parse(row["prompt"], "its prompt")
    entry = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == row["entry_point"]]
    docstring = (ast.get_docstring(entry[0]) if entry else None) or ""
    description = re.split(r">>>|\b(?:for )?examples?\b|\be\.g\.", docstring, maxsplit=1, flags=re.IGNORECASE)[0]
    check = row["test"].partition("def check")[2]
    return [description, docstring, row["prompt"], row["canonical_solution"], check]


def _nothing(row: Row) -> list[str]:
    return []


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gsm8k",
            hub_name="openai/gsm8k",
            hub_config="main",
            columns={"question": str, "answer": str},
            files=(),
            splits=("train", "validation", "test"),
            check=_check_gsm8k,
            prompt=lambda row: f"Question: {row['question']}\nAnswer:",
            completion=lambda row: f" {row['answer']}",
            texts=_texts_of_gsm8k,
        ),
        Task(
            name="mbpp",
            hub_name="google-research-datasets/mbpp",
            hub_config="full",
            columns={"task_id": int, "text": str, "code": str, "test_list": list},
            files=("mbpp.jsonl",),
            splits=tuple(MBPP_SPLITS),
            check=_check_mbpp,
            prompt=lambda row: _function_form(row)[0],
            completion=lambda row: _function_form(row)[1],
            texts=_nothing,
            ids=MBPP_SPLITS,
        ),
        Task(
            name="humaneval",
            hub_name="openai/openai_humaneval",
            hub_config=None,
            columns=dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str),
            files=("HumanEval.jsonl.gz", "HumanEval.jsonl"),
            splits=("test",),
            check=_check_humaneval,
            prompt=lambda row: row["prompt"],
            completion=lambda row: row["canonical_solution"],
            texts=_texts_of_humaneval,
            trains=False,
        ),
    )
}


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown: use one of {', '.join(TASKS)}.")
    return TASKS[name]


# ---------------------------------------------------------------------- loading


def load_rows(
    task: str,
    source: str,
    split: str = "train",
    *,
    bad_rows: Literal["refuse", "skip"] = "refuse",
    limit: int | None = None,
) -> list[Row]:
    """
    Loads and checks the rows of a dataset.

    Rows that hold a test problem of GSM8K or HumanEval are left out, with one warning, except from GSM8K's and
    HumanEval's own `test`; see the module.

    Args:
        task (`str`): one of `TASKS`.
        source (`str`):
            A folder with `<split>.jsonl` (or `.jsonl.gz`) or the file that the dataset is published as (`mbpp.jsonl`,
            `HumanEval.jsonl.gz`); one `.jsonl` or `.jsonl.gz` file; or a dataset on the Hub, `name` or `name:config`.
            A file of MBPP is divided by `task_id`; any other single file is the split, whatever it is called.
        split (`str`, *optional*, defaults to `"train"`):
            MBPP's are `"test"` (`task_id` 11 to 510), `"validation"` (511 to 600), `"train"` (601 to 974), `"prompt"`
            (1 to 10), and `"all"`, which is what to train on when another benchmark (HumanEval) does the examining.
        bad_rows (`"refuse"` or `"skip"`, *optional*, defaults to `"refuse"`):
            What to do if a row is malformed: raise, or leave it out with one warning that counts and shows them.
        limit (`int`, *optional*): stop after so many good rows; the rest is not looked at.

    Returns:
        `list[dict]`: the rows, as they are in the source.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if an argument is invalid, nothing is left, or a row is malformed and `bad_rows="refuse"`.
    """
    kind = _task(task)
    if split not in kind.splits:
        hint = " It is for evaluation only, nothing of it may be trained on." if not kind.trains else ""
        raise ValueError(f"split={split!r}: {task} has {', '.join(kind.splits)}.{hint}")
    if bad_rows not in ("refuse", "skip"):
        raise ValueError(f"bad_rows={bad_rows!r}: use 'refuse' or 'skip'.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: use a positive number, or None for all rows.")

    guard = None if split == "test" and task in ("gsm8k", "humaneval") else _guard(kind, source)
    rows: list[Row] = []
    bad: list[str] = []
    contaminated: list[str] = []
    seen = 0
    for place, row in _read(kind, source, split):
        seen += 1
        if isinstance(row, str):
            bad.append(f"{place}: {row}")
        elif (problem := _find_problem(kind, row)) is not None:
            bad.append(f"{place}: {problem}")
        elif kind.ids is not None and not _is_hub(source) and row["task_id"] not in kind.ids[split] and split != "all":
            continue
        elif guard is not None and (found := guard.find(row)) is not None:
            contaminated.append(f"{place} ({found})")
        else:
            rows.append(row)
            if len(rows) == limit:
                break

    if bad:
        listed = _listed(bad)
        if bad_rows == "refuse":
            raise ValueError(
                f"{source}: {len(bad)} of {seen} rows cannot be used for {task}:\n{listed}\nCorrect them, or leave them "
                "out with bad_rows='skip'."
            )
        logger.warning(f"{source}: skipped {len(bad)} of {seen} rows that cannot be used for {task}:\n{listed}")
    if contaminated:
        logger.warning(
            f"{source}: left out {len(contaminated)} of {seen} rows that hold a test problem of the named benchmark:\n"
            f"{_listed(contaminated)}"
        )
    if not rows:
        raise ValueError(
            f"{source}: nothing is left of the {seen} rows for split {split!r} of {task}. "
            + ("Is it the right file? MBPP is divided by task_id; split='all' takes every row." if kind.ids else "")
        )
    return rows


def _listed(items: Sequence[str]) -> str:
    more = [f"  ... and {len(items) - SHOWN_BAD_ROWS} more"] if len(items) > SHOWN_BAD_ROWS else []
    return "\n".join([f"  {item}" for item in items[:SHOWN_BAD_ROWS]] + more)


def _find_problem(task: Task, row: Row) -> str | None:
    """What is wrong with a row, or `None`."""
    for column, kind in task.columns.items():
        if column not in row:
            return f"it has no {column}"
        value = row[column]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"its {column} is {type(value).__name__}, not {kind.__name__}"
        if not (value.strip() if isinstance(value, str) else value) and not isinstance(value, int):
            return f"its {column} is empty"
    return task.check(row)


def _is_hub(source: str) -> bool:
    """Whether `source` names a dataset on the Hub; raises if it looks like a path that does not exist."""
    if Path(source).exists():
        return False
    name = source.partition(":")[0]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or re.search(r"\.(jsonl|gz|json)$", name):
        raise FileNotFoundError(f"{source!r} does not exist: give a folder, a .jsonl file or a dataset on the Hub.")
    return True


def _local_file(task: Task, source: str, split: str) -> Path:
    path = Path(source)
    if not path.is_dir():
        return path
    names = [f"{split}.jsonl", f"{split}.jsonl.gz", *task.files]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(
        f"{source!r} holds none of {', '.join(names)}: give a folder that does, or the file itself."
    )


def _read(task: Task, source: str, split: str) -> Iterator[tuple[str, Row | str]]:
    """`(place, row)` of all rows, or `(place, what is wrong)`; the place is a file with its line, or a number."""
    if _is_hub(source):
        yield from _read_hub(task, source, split)
    else:
        yield from _read_lines(_local_file(task, source, split))


def _read_hub(task: Task, source: str, split: str) -> Iterator[tuple[str, Row | str]]:
    from datasets import load_dataset

    name, _, own_config = source.partition(":")
    config = own_config or (task.hub_config if name == task.hub_name else None)
    parts = "+".join(part for part in MBPP_SPLITS if part != "all") if split == "all" else split
    try:
        table = load_dataset(name, config, split=parts)
    except Exception as error:
        raise ValueError(
            f"{source!r} is no local file or folder, and split {split!r} of it could not be loaded from the Hub "
            f"({type(error).__name__}: {error}). Correct the name, or give a path."
        ) from error
    for number, row in enumerate(table):
        yield f"row {number}", dict(row)


def _read_lines(path: Path) -> Iterator[tuple[str, Row | str]]:
    """Reads JSON lines one by one, so that whatever is wrong has a line number."""
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                if not line.strip(b"\xef\xbb\xbf \t\r\n"):
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8
                    yield f"{path.name}, line {number}", f"it is not JSON: {error}"
                    continue
                yield f"{path.name}, line {number}", row if isinstance(row, dict) else "it is not a JSON object"
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read beyond line {number}: {error}. Get the file anew.") from error


# ---------------------------------------------------------------------- for the trainer


def to_sft_dataset(task: str, rows: Iterable[Row], tokenizer: Any = None) -> Dataset:
    """
    Rows as a dataset with the columns `prompt` and `completion`, of which TRL trains the completion only.

    A tokenizer may merge the end of a prompt with the start of its completion (in GPT-2's way of splitting, a line break
    with the indentation after it). TRL would then train on another context than the one that generation starts from. So
    with such a tokenizer the rows come tokenized as well, prompt and completion on their own, as `input_ids` and
    `completion_mask`.

    Args:
        task (`str`): one of `TASKS`.
        rows (`Iterable[dict]`): what `load_rows` returned.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            If it has a chat template, prompt and completion are messages of the user and of the assistant. A template
            that changes the completion (some strip its first spaces, which are the indentation of code) is not used.

    Returns:
        `datasets.Dataset`: one row per row.

    Raises:
        ValueError: if there are no rows, or the task is for evaluation only.
    """
    from datasets import Dataset

    kind = _task(task)
    if not kind.trains:
        raise ValueError(f"{task} is for evaluation only: train on mbpp instead.")
    pairs = [(kind.prompt(row), kind.completion(row)) for row in rows]
    if not pairs:
        raise ValueError(f"no rows of {task} to make a dataset of: load some first.")
    if getattr(tokenizer, "chat_template", None):
        # a space that only joins the completion to the prompt is not part of a message
        chats = [(prompt, text if text.startswith("  ") else text.removeprefix(" ")) for prompt, text in pairs]
        if all(_survives(tokenizer, *chat) for chat in chats[:8]):
            return Dataset.from_list(
                [
                    {
                        "prompt": [{"role": "user", "content": prompt}],
                        "completion": [{"role": "assistant", "content": text}],
                    }
                    for prompt, text in chats
                ]
            )
        logger.warning(f"The chat template changes the completions of {task}: plain text is trained on instead.")
    texts = [{"prompt": prompt, "completion": text} for prompt, text in pairs]
    if tokenizer is not None and any(_merges(tokenizer, *pair) for pair in pairs[:8]):
        return Dataset.from_list([{**row, **_tokens(tokenizer, *pair)} for row, pair in zip(texts, pairs)])
    return Dataset.from_list(texts)


def _merges(tokenizer: Any, prompt: str, text: str) -> bool:
    """Whether the tokens of a prompt change when its completion follows."""
    alone = tokenizer(prompt)["input_ids"]
    return tokenizer(prompt + text)["input_ids"][: len(alone)] != alone


def _tokens(tokenizer: Any, prompt: str, text: str) -> dict[str, list[int]]:
    """What TRL makes of a row, but for where the completion starts."""
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": before + after, "completion_mask": [0] * len(before) + [1] * len(after)}


def _survives(tokenizer: Any, prompt: str, text: str) -> bool:
    """Whether a chat template renders a completion as it is, but for white space at its end."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return text.rstrip() in tokenizer.apply_chat_template(messages, tokenize=False)


# ---------------------------------------------------------------------- contamination


def normalise(text: str) -> list[str]:
    """The words of a text by which problems are compared: letters and digits of its NFKC form in lower case."""
    text = re.sub(r"<<.*?>>", "", text)
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def _hash_all(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()


def _hash_first(words: Sequence[str]) -> int:
    return zlib.crc32(" ".join(words).encode())


class Fingerprints:
    """
    Texts by which problems are recognised, kept as hashes.

    An entry is the number of words, a 4-byte hash of the first `WINDOW` of them, and an 8-byte hash of all.
    """

    ENTRY = struct.Struct("<HI8s")

    def __init__(self) -> None:
        self.whole: dict[bytes, str] = {}  # hash of all words: benchmark
        self.starts: dict[int, set[int]] = {}  # hash of the first words: numbers of words
        self.entries: dict[str, set[tuple[int, int, bytes]]] = {}  # by benchmark

    def copy(self) -> Fingerprints:
        other = Fingerprints()
        for name, entries in self.entries.items():
            for entry in entries:
                other._add(name, entry)
        return other

    def add(self, benchmark: str, text: str) -> None:
        words = normalise(text)
        if MIN_WORDS <= len(words) < 2**16:
            self._add(benchmark, (len(words), _hash_first(words[:WINDOW]), _hash_all(words)))

    def _add(self, benchmark: str, entry: tuple[int, int, bytes]) -> None:
        length, start, whole = entry
        self.entries.setdefault(benchmark, set()).add(entry)
        self.whole.setdefault(whole, benchmark)
        if length >= MIN_EMBEDDED_WORDS:
            self.starts.setdefault(start, set()).add(length)

    def find(self, row: Row) -> str | None:
        """The benchmark of which a field of the row holds a problem, or `None`."""
        for text in _fields(row):
            words = normalise(text)
            if len(words) >= MIN_WORDS and (found := self.whole.get(_hash_all(words))) is not None:
                return found
            for first in range(len(words) - MIN_EMBEDDED_WORDS + 1):
                for length in self.starts.get(_hash_first(words[first : first + WINDOW]), ()):
                    part = words[first : first + length]
                    if len(part) == length and (found := self.whole.get(_hash_all(part))) is not None:
                        return found
        return None

    def to_json(self, sources: Mapping[str, Any]) -> str:
        """The file: `sources` says, by benchmark, what it was made from."""
        benchmarks = {
            name: {
                "made_from": sources[name],
                "entries": base64.b64encode(b"".join(self.ENTRY.pack(*entry) for entry in sorted(entries))).decode(),
            }
            for name, entries in self.entries.items()
        }
        form = "words (u16), crc32 of the first words (u32), blake2b-64 of all words; little-endian, base64"
        content = {"entry": form, "first_words": WINDOW, "benchmarks": benchmarks}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Fingerprints:
        fingerprints, content = cls(), json.loads(text)
        if content["first_words"] != WINDOW:
            raise ValueError(
                f"the fingerprints were made with first_words={content['first_words']}, this version reads {WINDOW}: "
                "make them anew with python -m hf_phibalance.data."
            )
        for name, benchmark in content["benchmarks"].items():
            for entry in cls.ENTRY.iter_unpack(base64.b64decode(benchmark["entries"])):
                fingerprints._add(name, entry)
        return fingerprints


def _fields(row: Row) -> Iterator[str]:
    """The texts of a row: strings, and lists of strings (tests, messages) put together."""
    for value in row.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _fields(dict(value))
        elif isinstance(value, (list, tuple)):
            yield "\n".join(item for item in value if isinstance(item, str))
            for item in value:
                if isinstance(item, Mapping):
                    yield from _fields(dict(item))


@functools.cache
def shipped_fingerprints() -> Fingerprints:
    """Those of the package: test problems of GSM8K, and HumanEval."""
    return Fingerprints.from_json(FINGERPRINTS.read_text())


def _guard(task: Task, source: str) -> Fingerprints:
    """The shipped fingerprints, and for GSM8K those of a whole test set that is within reach; see the module."""
    shipped = shipped_fingerprints()
    if task.name != "gsm8k":
        return shipped
    guard, problems = shipped.copy(), 0
    for row in _test_rows(task, source):
        if not isinstance(row, str) and _find_problem(task, row) is None:
            problems += 1
            for text in task.texts(row):
                guard.add("gsm8k", text)
    return guard if problems else shipped


def _test_rows(task: Task, source: str) -> Iterator[Row | str]:
    """Test problems in the folder of the training rows or, for rows from the Hub, those of the benchmark there."""
    if _is_hub(source):
        try:
            yield from (row for _, row in _read_hub(task, task.hub_name, "test"))
        except ValueError as error:
            logger.warning(f"Training rows are checked by the shipped fingerprints only: {error}")
        return
    for name in ("test.jsonl", "test.jsonl.gz"):
        if (file := Path(source) / name).is_file():
            yield from (row for _, row in _read_lines(file))
            return


def drop_contaminated(rows: Iterable[Row], task: str) -> tuple[list[Row], list[Row]]:
    """
    Parts rows from those that hold a test problem of GSM8K or HumanEval; see the module. `load_rows` has done so.

    Args:
        rows (`Iterable[dict]`): rows of any form; all their texts are searched.
        task (`str`): what is trained, one of `TASKS`; of a task for evaluation only, nothing is kept.

    Returns:
        `tuple[list[dict], list[dict]]`: kept and dropped.
    """
    trains, guard = _task(task).trains, shipped_fingerprints()
    kept: list[Row] = []
    dropped: list[Row] = []
    for row in rows:
        (kept if trains and guard.find(row) is None else dropped).append(row)
    return kept, dropped


def write_fingerprints(sources: Mapping[str, str], path: str | Path = FINGERPRINTS) -> Fingerprints:
    """
    Makes the file of fingerprints.

    Args:
        sources (`dict[str, str]`): where the test split of each benchmark is, such as `{"gsm8k": "path/to/gsm8k"}`.
        path (`str` or `Path`, *optional*): where to write; the file in the package.

    Returns:
        [`Fingerprints`]: what was written.
    """
    fingerprints = Fingerprints()
    made_from = {}
    for name, source in sources.items():
        task = _task(name)
        rows = load_rows(name, source, "test")
        made_from[name] = {"dataset": task.hub_name, "split": "test", "problems": len(rows)}
        for row in rows:
            for text in task.texts(row):
                fingerprints.add(name, text)
    Path(path).write_text(fingerprints.to_json(made_from))
    return fingerprints


if __name__ == "__main__":
    if len(sys.argv) < 2 or not all("=" in argument for argument in sys.argv[1:]):
        raise SystemExit("usage: python -m hf_phibalance.data gsm8k=PATH humaneval=PATH")
    written = write_fingerprints(dict(argument.split("=", 1) for argument in sys.argv[1:]))
    for benchmark, entries in written.entries.items():
        print(f"{benchmark}: {len(entries)} texts")
    print(f"written to {FINGERPRINTS}")
