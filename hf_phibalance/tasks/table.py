"""The tasks, each a dataset: which rows of it are well formed, and how a row is put to a model."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .functions import FormError, function_form, parse


Row = dict[str, Any]

# MBPP's splits by task_id, as published.
MBPP_SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
    "all": range(1, 975),
}


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

    def find_problem(self, row: Row) -> str | None:
        """What is wrong with a row, or `None`."""
        for column, kind in self.columns.items():
            if column not in row:
                return f"it has no {column}"
            value = row[column]
            if not isinstance(value, kind) or isinstance(value, bool):
                return f"its {column} is {type(value).__name__}, not {kind.__name__}"
            if not (value.strip() if isinstance(value, str) else value) and not isinstance(value, int):
                return f"its {column} is empty"
        return self.check(row)


def _check_gsm8k(row: Row) -> str | None:
    if not re.search(r"#### -?[$0-9.,]*[0-9]", row["answer"]):
        return "its answer has no '#### <number>'"
    return None


def _check_mbpp(row: Row) -> str | None:
    if not all(isinstance(test, str) for test in row["test_list"]):
        return "its test_list holds something that is not text"
    try:
        function_form(row)
    except FormError as error:
        return str(error)
    return None


def _check_humaneval(row: Row) -> str | None:
    try:
        parse(f"{row['prompt']}{row['canonical_solution']}\n{row['test']}", "its prompt with solution and test")
    except FormError as error:
        return str(error)
    return None


def _texts_of_gsm8k(row: Row) -> list[str]:
    return [row["question"], row["answer"]]


def _texts_of_humaneval(row: Row) -> list[str]:
    module = parse(row["prompt"], "its prompt")
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
            prompt=lambda row: function_form(row)[0],
            completion=lambda row: function_form(row)[1],
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


def get_task(name: str) -> Task:
    """The task of that name; raises if there is none."""
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown: use one of {', '.join(TASKS)}.")
    return TASKS[name]
