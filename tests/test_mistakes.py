"""recipes/guides/MISTAKES.md: each row names a test that exists and quotes what the package says, and none is silent."""

import ast
import functools
import re

import pytest
from paths import ROOT, sources


pytestmark = pytest.mark.slow


PAGE = ROOT / "recipes/guides/MISTAKES.md"
OUTCOME = re.compile(r"(exact|error|warning)\b")
OF_OTHERS = re.compile(r"error \(of (torch|transformers)\): `")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)(\[[^`]+\])?`")


def rows():
    """The three cells of each row of the tables, without their heads."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0] != "what one does":
            yield cells


@functools.cache
def functions(path):
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef)}


def text_of(node):
    """The text of a string in the source, its values as `...`; `None` for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


@functools.cache
def said():
    """All texts in the sources of the package and of the recipes that are no docstrings."""
    found = set()
    for path in sources("hf_phibalance", "recipes"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found |= {text_of(node) for node in ast.walk(tree) if id(node) not in documented}
    return [text for text in found if text]


def is_said(quote):
    """Whether a text begins with `quote`, in which `...` stands for anything."""
    pattern = re.compile(".*?".join(map(re.escape, quote.split("..."))), re.DOTALL)
    return any(pattern.match(text) for text in said())


def test_the_quotes_are_looked_up():
    assert is_said("... is not φ-balanced; call phb.patch(model) first.") and is_said("`ema_rate` must lie in")
    assert not is_said("must lie in") and not is_said("`ema_rate` must be in")


def test_each_row_holds():
    found = list(rows())
    assert len(found) >= 60 and all(len(row) == 3 for row in found), [row for row in found if len(row) != 3]
    assert len({row[0] for row in found}) == len(found), "a row is there twice"
    for what, seen, test in found:
        assert OUTCOME.match(seen) and "silent" not in seen, what
        quotes = re.findall(r'"(.+?)"(?=$|[ ,])', seen)
        if not seen.startswith("exact") and not OF_OTHERS.match(seen):
            assert quotes, f"{what}: no message is quoted"
            for quote in quotes:
                assert len(quote.replace("...", "")) > 12 and is_said(quote), f"{what}: nothing says {quote!r}"
        named = TEST.fullmatch(test)
        assert named, f"{what}: {test} is no test"
        assert named[2] in functions(named[1]), f"{what}: {test} does not exist"
