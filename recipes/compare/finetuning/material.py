"""Everything that is trained on and measured with, as tokens: the windows of the bases' text, the exercises of the tasks."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..corpus import END_OF_TEXT, train_tokenizer, windows
from ..documents import BUILT_IN, digest_of, read_documents, split_documents
from .exercises import EXERCISES, GRADED, MADE, Exercise, Task


WINDOW = 128  # tokens of a row of the bases' text
LONGEST = 256  # tokens of an exercise; longer ones are left out
HELD_OUT_WINDOWS = 64  # of each domain
IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """
    Exercises as tokens.

    Args:
        train, held_out (`list[tuple[list[int], int]]`): ids of prompt, completion and end, and how many are the prompt's.
        graded (`list[tuple[list[int], str]]`): ids of the prompt, and what the answer is scored by.
        grade (`str`): How.
    """

    train: list[tuple[list[int], int]]
    held_out: list[tuple[list[int], int]]
    graded: list[tuple[list[int], str]]
    grade: str


@dataclass(frozen=True)
class Material:
    """
    Args:
        train, validation (`dict[str, torch.Tensor]`): windows `(N, WINDOW)` of the bases' text by domain.
        tasks (`dict[str, Encoded]`): the exercises by task.
        tokenizer (`str`): of `tokenizers`, as JSON.
        fingerprint (`str`): digest of all texts and of how they were cut.
    """

    train: dict[str, Tensor]
    validation: dict[str, Tensor]
    tasks: dict[str, Encoded]
    tokenizer: str
    fingerprint: str

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.train)

    def load_tokenizer(self):
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.load_tokenizer().get_vocab_size()


def build_material(source: str, vocab_size: int, cache: Path) -> Material:
    """
    Reads the texts, draws what is made, tokenises all; or takes what an earlier call left in `cache`.

    Args:
        source (`str`): Folder with `gsm8k/`, `mbpp/` and `wikitext2/`, or `"built-in"` for what needs no data.
        vocab_size (`int`): Tokens of the tokenizer, trained on the training parts; each digit is a token.
        cache (`pathlib.Path`): Folder to keep it in.
    """
    data = None if source == BUILT_IN else Path(source)
    tasks = {name: make(data) for name, make in EXERCISES.items() if data is not None or name in MADE}
    # GSM8K comes among the tasks, half of it for the bases
    texts = {name: split_documents(docs) for name, docs in read_documents(source).items() if name != "problems"}
    texts["exercises"] = split_documents([e.prompt + e.completion for task in tasks.values() for e in task.base])
    digest = hashlib.sha256(f"{vocab_size} {WINDOW} {LONGEST} {HELD_OUT_WINDOWS} {GRADED}".encode())
    for parts in texts.values():
        for text in (*parts[0], *parts[1]):
            digest.update(digest_of(text))
    for task in tasks.values():
        for exercise in (*task.train, *task.held_out):
            digest.update(digest_of(exercise.prompt + exercise.completion + exercise.reference))
    fingerprint = digest.hexdigest()[:16]
    path = cache / f"material-{fingerprint}.pt"
    if path.is_file():
        return load_material(fingerprint, cache)
    tokenizer = train_tokenizer([train for train, _ in texts.values()], vocab_size, digits_alone=True)
    cut = {name: [windows(tokenizer, part, WINDOW) for part in parts] for name, parts in texts.items()}
    fields = {
        "train": {name: parts[0] for name, parts in cut.items()},
        "validation": {name: _spread(name, parts[1]) for name, parts in cut.items()},
        "tasks": {name: vars(_encode(tokenizer, task)) for name, task in tasks.items()},
        "tokenizer": tokenizer.to_str(),
        "fingerprint": fingerprint,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(fields, partial)
    os.replace(partial, path)
    return load_material(fingerprint, cache)


def load_material(fingerprint: str, cache: Path) -> Material:
    """What [`build_material`] left in `cache`."""
    fields = torch.load(cache / f"material-{fingerprint}.pt", weights_only=True)
    return Material(**{**fields, "tasks": {name: Encoded(**task) for name, task in fields["tasks"].items()}})


def _spread(name: str, rows: Tensor) -> Tensor:
    if len(rows) < HELD_OUT_WINDOWS:
        raise ValueError(f"the held-out text of {name!r} has {len(rows)} windows, {HELD_OUT_WINDOWS} are needed.")
    return rows[torch.linspace(0, len(rows) - 1, HELD_OUT_WINDOWS).round().long()]


def _encode(tokenizer, task: Task) -> Encoded:
    end = tokenizer.token_to_id(END_OF_TEXT)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode(exercises: list[Exercise]) -> list[tuple[list[int], int]]:
        rows = [(ids(e.prompt), ids(e.completion)) for e in exercises]
        return [([*p, *c, end], len(p)) for p, c in rows if len(p) + len(c) < LONGEST]

    graded = [(ids(e.prompt), e.reference) for e in task.held_out[:GRADED]] if task.grade else []
    return Encoded(
        encode(task.train), encode(task.held_out), [row for row in graded if len(row[0]) < LONGEST], task.grade
    )


def collate(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` (of completions only), padded on the right, each `(B, S)`."""
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), longest, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORED),
    }
    for row, (ids, prompt) in enumerate(rows):
        batch["input_ids"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return batch
