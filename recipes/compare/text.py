"""Text of three domains: reads it, splits it into training and held-out documents, tokenises it and makes batches."""

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
from typing import Any

import torch
from torch import Tensor


DOMAINS = ("problems", "prose", "python")
STREAMS = ("mixed", "blocked", "shift")
BUILT_IN = "built-in"
END_OF_TEXT = "<|endoftext|>"
LONGEST_DOCUMENT = 20_000  # characters, so that no single module fills a held-out part
WIKITEXT_FILES = (
    *("wiki.train.raw", "wiki.train.tokens", "train.txt"),
    *("valid.txt", "wiki.valid.raw", "wiki.valid.tokens"),
)
PYTHON_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests"),
    *("idlelib", "lib2to3", "pydoc_data", "__pycache__"),
}


# ---------------------------------------------------------------------- documents


def read_documents(source: str | os.PathLike) -> dict[str, list[str]]:
    """
    Returns the documents of each domain, in a fixed order. The Python domain is Python's standard library. The others are in the folder
    `source`, as `gsm8k/train.jsonl` and a text file of WikiText-2 in `wikitext2/`. For `"built-in"` they are generated word problems and
    the reference text that comes with Python.
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
    """Splits WikiText into articles. Each starts with a line ` = Title = `; sections have more equals signs."""
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
    """Returns the topics of Python's `help()`, which the standard library holds as one dict of texts."""
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
    Splits one domain into training and held-out documents, without duplicates. Holds out at least one document, and
    the share `held_out` of the characters. Orders documents by a digest of their text, so that each keeps its place
    when others change.
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


# ---------------------------------------------------------------------- tokens


def train_tokenizer(parts: Sequence[Sequence[str]], vocab_size: int, digits_alone: bool = False):
    """Trains a byte-level BPE tokenizer on equally many characters per part. `digits_alone`: one token per digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    share = min(sum(map(len, texts)) for texts in parts)
    equal = []
    for texts in parts:
        sizes = itertools.accumulate(map(len, texts))
        equal += [text for text, size in zip(texts, sizes) if size <= share or text is texts[0]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits_alone:
        split = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(equal, trainer)
    return tokenizer


def windows(tokenizer, documents: Sequence[str], window: int) -> Tensor:
    """Joins documents, each ended by an end-of-text token, and cuts them into rows `(N, window)`. Drops the rest."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        ids += [*encoding.ids, end]
    count = len(ids) // window
    return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)


def spread_over(rows: Tensor, count: int, domain: str) -> Tensor:
    """Returns `count` of the held-out `rows (N, window)`, evenly spaced."""
    if len(rows) < count:
        raise ValueError(
            f"{count} held-out windows of each domain are wanted, but {domain!r} has only {len(rows)} of {rows.shape[1]} "
            "tokens. Use fewer or shorter windows (`validation_windows`, `window`), or more text."
        )
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def save_tensors(fields: dict[str, Any], path: Path) -> None:
    """Writes `fields` for [`load_tensors`]. A killed process leaves no partial file under that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(fields, partial)
    os.replace(partial, path)


def load_tensors(path: Path) -> dict[str, Any]:
    """Reads what [`save_tensors`] wrote; unpickles nothing."""
    try:
        return torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged files raise many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}); remove it, and it is made again.") from error


@dataclass(frozen=True)
class Corpus:
    """Tokenised text: windows `(N, window)` int64 of the two parts, by domain."""

    train: dict[str, Tensor]
    validation: dict[str, Tensor]
    vocab_size: int
    fingerprint: str  # digest of the text and its cut


def build_corpus(source: str, window: int, vocab_size: int, validation_windows: int, cache: Path) -> Corpus:
    """Reads, splits and tokenises the text, or loads the result of an earlier call from the folder `cache`."""
    splits = {domain: split_documents(texts) for domain, texts in read_documents(source).items()}
    digest = hashlib.sha256(f"{window} {vocab_size} {validation_windows}".encode())
    for text in itertools.chain.from_iterable(itertools.chain(*splits.values())):
        digest.update(digest_of(text))
    fingerprint = digest.hexdigest()[:16]
    path = cache / f"corpus-{fingerprint}.pt"
    if not path.is_file():
        tokenizer = train_tokenizer([train for train, _ in splits.values()], vocab_size)
        train = {domain: windows(tokenizer, part, window) for domain, (part, _) in splits.items()}
        held = {domain: windows(tokenizer, part, window) for domain, (_, part) in splits.items()}
        validation = {domain: spread_over(rows, validation_windows, domain) for domain, rows in held.items()}
        fields = {"train": train, "validation": validation, "vocab_size": tokenizer.get_vocab_size()}
        save_tensors({**fields, "fingerprint": fingerprint}, path)
    return load_corpus(fingerprint, cache)


def load_corpus(fingerprint: str, cache: Path) -> Corpus:
    """Loads the result of [`build_corpus`] from `cache`."""
    path = cache / f"corpus-{fingerprint}.pt"
    try:
        return Corpus(**load_tensors(path))
    except TypeError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it, and it is made again.") from error


# ---------------------------------------------------------------------- batches


def batches(corpus: Corpus, stream: str, steps: int, rows: int, seed: int) -> Iterator[Tensor]:
    """
    Yields the token ids `(rows, window)` of every optimizer step. They do not depend on balancing.

    Each domain is shuffled by `seed`. All its windows come once before any repeats.
    """
    sources = [_endless(corpus.train[domain], f"{seed} {domain}") for domain in DOMAINS]
    for counts in schedule(stream, steps, rows):
        yield torch.stack([next(source) for source, count in zip(sources, counts) for _ in range(count)])


def _endless(rows: Tensor, seed: str) -> Iterator[Tensor]:
    rng = random.Random(seed)
    while True:
        for index in rng.sample(range(len(rows)), len(rows)):
            yield rows[index]


def schedule(stream: str, steps: int, rows: int) -> list[tuple[int, ...]]:
    """
    Returns the number of rows of each domain (in the order of `DOMAINS`) in every step. They add up to `rows`.

    - `"mixed"`: all domains in every step, as equally as whole rows allow.
    - `"blocked"`: one domain a step, in turn.
    - `"shift"`: shares of 4/9, 4/9, 1/9 in the first half of the steps and of 1/9, 1/9, 7/9 in the second.
    """
    count = len(DOMAINS)
    if stream == "blocked":
        return [tuple(rows * (domain == step % count) for domain in range(count)) for step in range(steps)]
    if rows < count:
        raise ValueError(f"`rows` is {rows}, but a step of stream {stream!r} holds all {count} domains.")
    equal, before, after = (1 / 3, 1 / 3, 1 / 3), (4 / 9, 4 / 9, 1 / 9), (1 / 9, 1 / 9, 7 / 9)
    plan, owed = [], [0.0] * count
    for step in range(steps):
        shares = equal if stream == "mixed" else before if step < steps // 2 else after
        owed = [have + rows * share for have, share in zip(owed, shares)]
        counts = [max(1, int(have + 1e-9)) for have in owed]
        while sum(counts) != rows:  # round to whole rows: change the domain that is furthest from its share
            sign = 1 if sum(counts) < rows else -1
            open_to = [domain for domain in range(count) if counts[domain] + sign >= 1]
            counts[max(open_to, key=lambda domain: sign * (owed[domain] - counts[domain]))] += sign
        owed = [have - count for have, count in zip(owed, counts)]
        plan.append(tuple(counts))
    return plan
