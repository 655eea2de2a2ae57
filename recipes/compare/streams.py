# Copyright 2026 The hf_phibalance authors.
# SPDX-License-Identifier: Apache-2.0
"""The text of the comparison: three domains, split by document, a tokenizer trained on the spot, and streams of batches.

A domain is a list of documents. Some documents are held out as a whole, the others are joined with an end-of-text token
between them and cut into windows of equal length, so that every row of every batch is full. A stream says how many rows
of which domain each optimizer step gets, and in which order their windows come; it depends on the seed and on nothing
that a balancing method does, so that all methods see the same batches.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


DOMAINS = ("problems", "prose", "python")
STREAMS = ("mixed", "blocked", "shift")
END_OF_TEXT = "<|endoftext|>"
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
# Shares of the domains in a step: equal, and for the shifted stream before and after half of the steps.
EQUAL = (1 / 3, 1 / 3, 1 / 3)
BEFORE, AFTER = (4 / 9, 4 / 9, 1 / 9), (1 / 9, 1 / 9, 7 / 9)


@dataclass(frozen=True)
class Corpus:
    """
    Tokenised text: windows `(N, window)` int64 by domain.

    Args:
        train, validation (`dict[str, torch.Tensor]`): windows of the documents of each part.
        vocab_size (`int`): size of the tokenizer that was trained on the training part.
        fingerprint (`str`): digest of all windows; the same for the same text, tokenizer and window length.
    """

    train: dict[str, Tensor]
    validation: dict[str, Tensor]
    vocab_size: int
    fingerprint: str


# ---------------------------------------------------------------------- documents


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
    unique = sorted({text[:LONGEST_DOCUMENT] for text in documents if text.strip()}, key=_digest)
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


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


# ---------------------------------------------------------------------- tokens


def build_corpus(
    source: str | os.PathLike, window: int, vocab_size: int, validation_windows: int, cache: str | os.PathLike
) -> Corpus:
    """
    Reads, splits and tokenises the text, or takes what an earlier call left in `cache`.

    Args:
        source (`str` or `os.PathLike`): See [`read_documents`].
        window (`int`): Tokens of a row.
        vocab_size (`int`): Tokens of the byte-level BPE tokenizer, trained on the training parts.
        validation_windows (`int`): Held-out windows of each domain, evenly spread over its held-out documents.
        cache (`str` or `os.PathLike`): Folder for `tokenizer-*.json` and `corpus-*.pt`.
    """
    documents = read_documents(source)
    splits = {domain: split_documents(texts) for domain, texts in documents.items()}
    digest = hashlib.sha256(f"{window} {vocab_size} {validation_windows}".encode())
    for text in itertools.chain.from_iterable(itertools.chain(*splits.values())):
        digest.update(_digest(text))
    fingerprint = digest.hexdigest()[:16]
    path = Path(cache) / f"corpus-{fingerprint}.pt"
    if path.is_file():
        return Corpus(**torch.load(path, weights_only=True))
    tokenizer = train_tokenizer([train for train, _ in splits.values()], vocab_size)
    train = {domain: _windows(tokenizer, split[0], window) for domain, split in splits.items()}
    validation = {domain: _windows(tokenizer, split[1], window) for domain, split in splits.items()}
    for domain, rows in validation.items():
        if len(rows) < validation_windows:
            raise ValueError(
                f"`validation_windows` is {validation_windows}, but the held-out part of {domain!r} has only "
                f"{len(rows)} windows of {window} tokens. Use fewer or shorter windows, or more text."
            )
        chosen = torch.linspace(0, len(rows) - 1, validation_windows).round().long()
        validation[domain] = rows[chosen]
    fields = {"train": train, "validation": validation, "vocab_size": tokenizer.get_vocab_size()}
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path.parent / f"tokenizer-{fingerprint}.json"))
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save({**fields, "fingerprint": fingerprint}, partial)
    os.replace(partial, path)
    return Corpus(**fields, fingerprint=fingerprint)


def load_corpus(fingerprint: str, cache: str | os.PathLike) -> Corpus:
    """The corpus that [`build_corpus`] left in `cache`."""
    return Corpus(**torch.load(Path(cache) / f"corpus-{fingerprint}.pt", weights_only=True))


def train_tokenizer(parts: Sequence[Sequence[str]], vocab_size: int):
    """A byte-level BPE tokenizer that knows equally much (by characters) of every part."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    share = min(sum(map(len, texts)) for texts in parts)
    equal = []
    for texts in parts:
        sizes = itertools.accumulate(map(len, texts))
        equal += [text for text, size in zip(texts, sizes) if size <= share or text is texts[0]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(equal, trainer)
    return tokenizer


def _windows(tokenizer, documents: Sequence[str], window: int) -> Tensor:
    """Documents joined, with an end-of-text token after each, and cut into rows `(N, window)`; the rest is dropped."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        ids += [*encoding.ids, end]
    count = len(ids) // window
    return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)


# ---------------------------------------------------------------------- streams


def schedule(stream: str, steps: int, rows: int) -> list[tuple[int, ...]]:
    """
    Rows of each domain in every optimizer step, in the order of `DOMAINS`; each step's add up to `rows`.

    - `"mixed"`: every step holds all domains, as equally as whole rows allow.
    - `"blocked"`: every step holds one domain; the domains take turns.
    - `"shift"`: shares of 4/9, 4/9, 1/9 in the first half of the steps and of 1/9, 1/9, 7/9 in the second.

    Raises:
        ValueError: for another stream, or if a step cannot hold all domains.
    """
    if stream not in STREAMS:
        raise ValueError(f"`stream` must be one of {', '.join(map(repr, STREAMS))}, got {stream!r}.")
    if stream == "blocked":
        return [
            tuple(rows * (domain == step % len(DOMAINS)) for domain in range(len(DOMAINS))) for step in range(steps)
        ]
    if rows < len(DOMAINS):
        raise ValueError(f"`rows` is {rows}, but a step of stream {stream!r} holds all {len(DOMAINS)} domains.")
    plan, owed = [], [0.0] * len(DOMAINS)
    for step in range(steps):
        shares = EQUAL if stream == "mixed" else BEFORE if step < switch_step(steps) else AFTER
        owed = [have + rows * share for have, share in zip(owed, shares)]
        counts = [max(1, int(have + 1e-9)) for have in owed]
        while sum(counts) != rows:  # whole rows: the domain that is owed most (or least) gives way
            sign = 1 if sum(counts) < rows else -1
            open_to = [d for d in range(len(DOMAINS)) if counts[d] + sign >= 1]
            domain = max(open_to, key=lambda d: sign * (owed[d] - counts[d]))
            counts[domain] += sign
        owed = [have - count for have, count in zip(owed, counts)]
        plan.append(tuple(counts))
    return plan


def switch_step(steps: int) -> int:
    """The first step of the second mixture."""
    return steps // 2


def batches(corpus: Corpus, stream: str, steps: int, rows: int, seed: int) -> Iterator[Tensor]:
    """
    The token ids `(rows, window)` of every optimizer step. Each domain is gone through in an order that depends on the
    seed, every window once before any comes again.
    """
    sources = [_endless(corpus.train[domain], f"{seed} {domain}") for domain in DOMAINS]
    for counts in schedule(stream, steps, rows):
        yield torch.stack([next(source) for source, count in zip(sources, counts) for _ in range(count)])


def _endless(windows: Tensor, seed: str) -> Iterator[Tensor]:
    rng = random.Random(seed)
    while True:
        for index in rng.sample(range(len(windows)), len(windows)):
            yield windows[index]
