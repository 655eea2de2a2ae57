"""The tasks: checks dataset rows and turns them into prompts and completions. Programs are parsed but never run."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


Row = dict[str, Any]

# task_id of MBPP's splits, as published
MBPP_SPLITS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
    "all": range(1, 975),
}


class FormError(ValueError):
    """A row's code cannot be parsed or written as a function to be completed."""


@dataclass(frozen=True)
class Task:
    """A dataset, and how its rows become prompts and completions."""

    name: str  # key in `TASKS`
    hub_name: str
    columns: Mapping[str, type]  # required fields of a row; strings and lists must not be empty
    splits: tuple[str, ...]
    check: Callable[[Row], Any]  # raises `FormError` if a row with the right columns is malformed
    prompt: Callable[[Row], str]
    completion: Callable[[Row], str]  # follows the prompt without a separator
    texts: Callable[[Row], list[str]]  # texts that identify a test problem
    hub_config: str | None = None
    files: tuple[str, ...] = ()  # usual names of a local file with all splits, or with the only one
    trains: bool = True  # False for a task for evaluation only

    def find_problem(self, row: Row) -> str | None:
        """Returns what is wrong with a row, or `None`."""
        for column, kind in self.columns.items():
            if column not in row:
                return f"it has no {column}"
            value = row[column]
            if not isinstance(value, kind) or isinstance(value, bool):
                return f"its {column} is {type(value).__name__}, not {kind.__name__}"
            if not (value.strip() if isinstance(value, str) else value) and not isinstance(value, int):
                return f"its {column} is empty"
        try:
            self.check(row)
        except FormError as error:
            return str(error)
        return None


def _parse(code: str, what: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FormError(f"{what} does not compile: {error}") from None


def _check_gsm8k(row: Row) -> None:
    if not re.search(r"#### -?[$0-9.,]*[0-9]", row["answer"]):
        raise FormError("its answer has no '#### <number>'")


def _check_humaneval(row: Row) -> None:
    _parse(f"{row['prompt']}{row['canonical_solution']}\n{row['test']}", "its prompt with solution and test")


def function_form(row: Row) -> tuple[str, str]:
    """
    Returns a row of MBPP in the form of HumanEval's problems: the prompt is a function up to the end of its docstring,
    the completion is the body.

    The function is the one that the first test calls. Its docstring is the row's text, with the first test as an
    example. The rest of the row's code (imports, constants, helpers) comes before it. The code is unparsed from its
    syntax tree, so the body always has four spaces, `\\n` and no comments.
    """
    if not all(isinstance(test, str) for test in row["test_list"]):
        raise FormError("its test_list holds something that is not text")
    module = _parse(row["code"], "its code")
    tests = _parse(row["test_list"][0].strip(), "its first test").body
    if len(tests) != 1 or not isinstance(tests[0], ast.Assert):
        raise FormError("its first test is not one assert")
    test = tests[0].test
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    calls = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
    names = [name.id for name in calls if isinstance(name, ast.Name) and name.id in functions]
    if not names:
        raise FormError("its first test calls no function that its code defines")
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
        raise FormError(f"its function {entry.name} has no body")
    others = [node for node in module.body if node is not entry]
    whole, entry.body = ast.unparse(entry), [ast.Pass()]
    header = ast.unparse(entry).removesuffix("\n    pass")
    prompt = f'{header}\n    """ {docstring}\n    """\n'
    if others:
        prompt = f"{ast.unparse(ast.Module(others, []))}\n\n\n{prompt}"
    return prompt, whole.removeprefix(header).strip("\n") + "\n"


def _texts_of_humaneval(row: Row) -> list[str]:
    module = _parse(row["prompt"], "its prompt")
    entry = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == row["entry_point"]]
    docstring = (ast.get_docstring(entry[0]) if entry else None) or ""
    description = re.split(r">>>|\b(?:for )?examples?\b|\be\.g\.", docstring, maxsplit=1, flags=re.IGNORECASE)[0]
    check = row["test"].partition("def check")[2]
    return [description, docstring, row["prompt"], row["canonical_solution"], check]


TASKS: dict[str, Task] = {
    "gsm8k": Task(
        name="gsm8k",
        hub_name="openai/gsm8k",
        hub_config="main",
        columns={"question": str, "answer": str},
        splits=("train", "validation", "test"),
        check=_check_gsm8k,
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        completion=lambda row: f" {row['answer']}",
        texts=lambda row: [row["question"], row["answer"]],
    ),
    "mbpp": Task(
        name="mbpp",
        hub_name="google-research-datasets/mbpp",
        hub_config="full",
        columns={"task_id": int, "text": str, "code": str, "test_list": list},
        files=("mbpp.jsonl",),
        splits=tuple(MBPP_SPLITS),
        check=function_form,
        prompt=lambda row: function_form(row)[0],
        completion=lambda row: function_form(row)[1],
        texts=lambda row: [],
    ),
    "humaneval": Task(
        name="humaneval",
        hub_name="openai/openai_humaneval",
        columns=dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str),
        files=("HumanEval.jsonl.gz", "HumanEval.jsonl"),
        splits=("test",),
        check=_check_humaneval,
        prompt=lambda row: row["prompt"],
        completion=lambda row: row["canonical_solution"],
        texts=_texts_of_humaneval,
        trains=False,
    ),
}


def get_task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown: use one of {', '.join(TASKS)}.")
    return TASKS[name]
