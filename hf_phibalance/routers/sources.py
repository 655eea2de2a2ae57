"""What the source of a router, or of the block around it, says of it: the scoring, the top-k, what it returns."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Hashable
from contextlib import suppress
from typing import Any, cast

from torch import nn


@functools.cache
def class_source(module_class: Hashable) -> str:
    return inspect.getsource(cast(Any, module_class))


@functools.cache
def code_of(module_class: Hashable) -> str:
    """Source of a class and of its bases, as far as there is one (not of classes made at run time), without torch's."""
    sources = []
    for base in cast(type, module_class).__mro__:
        with suppress(OSError, TypeError):
            sources.append("" if base.__module__.startswith("torch.") else class_source(base))
    return "\n".join(sources)


def takes_top_k(*modules: nn.Module | None) -> bool:
    """Whether the code of any of `modules` takes a top-k."""
    return any("topk(" in code_of(cast(Hashable, type(module))) for module in modules if module is not None)


@functools.cache
def returned_values(router_class: Hashable) -> list[str]:
    """
    For each value that the forward of `router_class` returns, the last of `"softmax"` and `"scatter"` that it went
    through by the source: the first makes probabilities of logits, the second puts top-k weights in their places.
    """
    tree = None
    with suppress(OSError, TypeError, SyntaxError):
        tree = ast.parse(textwrap.dedent(inspect.getsource(cast(Any, router_class).forward)))
    if tree is None:
        return []
    made: dict[str, str] = {}
    statements = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.Return))]
    for node in sorted(statements, key=lambda node: node.lineno):
        if isinstance(node, ast.Return):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            return [made.get(value.id, "") if isinstance(value, ast.Name) else "" for value in values]
        name, value = ast.unparse(node.targets[0]), ast.unparse(node.value)
        how = re.search(r"(softmax|scatter)_?\(", value)
        made[name] = how[1] if how else made.get(name, "") if re.search(rf"\b{re.escape(name)}\b", value) else ""
    return []


def scoring_in(code: str) -> str:
    """`"sigmoid"` or `"softmax"`, whichever `code` applies."""
    return "sigmoid" if "sigmoid(" in code else "softmax"
