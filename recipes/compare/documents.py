"""The text of the comparison: documents of three domains, some of them held out as a whole."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path


DOMAINS = ("problems", "prose", "python")
BUILT_IN = "built-in"
PYTHON_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "__pycache__",
}
WIKITEXT_FILES = (
    "wiki.train.raw",
    "wiki.train.tokens",
    "train.txt",
    "valid.txt",
    "wiki.valid.raw",
    "wiki.valid.tokens",
)
LONGEST_DOCUMENT = 20_000  # characters, so that no single module fills a held-out part


def read_documents(source: str | os.PathLike) -> dict[str, list[str]]:
    """
    The documents of all domains, in a fixed order.

    Args:
        source (`str` or `os.PathLike`):
            Folder with `gsm8k/train.jsonl` (rows with `question` and `answer`) and `wikitext2/` (a text file of
            WikiText-2), or `"built-in"` for generated word problems and the reference text that comes with Python. The
            third domain is in both cases the sources of Python's standard library.

    Raises:
        FileNotFoundError: if the folder lacks one of the two.
    """
    if str(source) == BUILT_IN:
        return {"problems": _made_problems(), "prose": _python_topics(), "python": _python_sources()}
    folder = Path(source)
    problems = folder / "gsm8k" / "train.jsonl"
    texts = [folder / "wikitext2" / name for name in WIKITEXT_FILES]
    prose = next((path for path in texts if path.is_file()), None)
    if not problems.is_file() or prose is None:
        missing = str(problems) if not problems.is_file() else f"{folder / 'wikitext2'} with one of {WIKITEXT_FILES}"
        raise FileNotFoundError(
            f"`data` is {str(source)!r}, but there is no {missing}. Put GSM8K's train.jsonl and WikiText-2's text "
            f"there, or use data={BUILT_IN!r} for a small comparison on text that needs no download."
        )
    rows = [json.loads(line) for line in problems.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {
        "problems": [f"{row['question']}\n{row['answer']}" for row in rows],
        "prose": _articles(prose.read_text(encoding="utf-8")),
        "python": _python_sources(),
    }


def _articles(text: str) -> list[str]:
    """WikiText as articles: each starts with a line ` = Title = ` (sections have more equals signs)."""
    starts = [match.start() for match in re.finditer(r"^ = [^=].*[^=] = $", text, re.MULTILINE)]
    pieces = [text[start:stop].strip() for start, stop in itertools.pairwise([*starts, len(text)])]
    return [piece for piece in pieces if piece]


def _python_sources() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in root.rglob("*.py") if not PYTHON_LEFT_OUT & set(path.relative_to(root).parts)]
    documents = []
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        try:
            documents.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue  # a few modules are in other encodings on purpose
    return documents


def _python_topics() -> list[str]:
    """The topics of Python's own `help()`, which lie beside the standard library as one dict of texts."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    topics = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    )
    return [str(ast.literal_eval(value)) for value in topics.values]


def _made_problems() -> list[str]:
    from hf_phibalance.tasks import make_splits

    return [f"{row['question']}\n{row['answer']}" for row in make_splits(1500)["train"]]


def split_documents(
    documents: Sequence[str], held_out: float = 0.1, most_characters: int = 1_200_000
) -> tuple[list[str], list[str]]:
    """
    Training and held-out documents; whole documents, duplicates dropped first, so that none is in both.

    The order is that of a digest of the text, so a document stays where it is when others come or go before it.

    Args:
        documents (`Sequence[str]`): One domain.
        held_out (`float`, *optional*, defaults to `0.1`): Share of the characters to hold out, at least one document.
        most_characters (`int`, *optional*, defaults to `1_200_000`): What is beyond is left out.
    """
    unique = sorted({text[:LONGEST_DOCUMENT] for text in documents if text.strip()}, key=digest_of)
    if len(unique) < 2:
        raise ValueError(f"`documents` holds {len(unique)} different documents; a split needs at least 2.")
    kept, characters = [], 0
    for text in unique:
        if characters >= most_characters and len(kept) >= 2:
            break
        kept.append(text)
        characters += len(text)
    count, held = 0, 0
    while count < len(kept) - 1 and (held < held_out * characters or not count):
        held += len(kept[count])
        count += 1
    return kept[count:], kept[:count]


def digest_of(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
