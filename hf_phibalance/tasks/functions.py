"""MBPP's rows as functions to be completed, the form of HumanEval: programs are read as syntax trees and never run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any


class FormError(ValueError):
    """Code cannot be read, or a row cannot be written as a function to be completed."""


def parse(code: str, what: str) -> ast.Module:
    """The syntax tree of code that is never run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FormError(f"{what} does not compile: {error}") from None


def function_form(row: Mapping[str, Any]) -> tuple[str, str]:
    """
    A row of MBPP as HumanEval puts its problems: the prompt is a function up to the end of its docstring, the
    completion is the body.

    The function is the one that the first test calls. Its docstring is the row's text and the first test as an
    example; whatever else the row's code holds (imports, constants, helpers) comes before it. The code is written anew
    from its syntax tree, so the body has four spaces, `\\n` and no comments whatever the row's habits.
    """
    module = parse(row["code"], "its code")
    tests = parse(row["test_list"][0].strip(), "its first test").body
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
