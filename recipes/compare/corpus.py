"""
The text as tokens: a tokenizer trained on the spot, and windows of equal length.

The documents of a part are joined with an end-of-text token between them and cut into windows, so that every row of
every batch is full.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .documents import digest_of, read_documents, split_documents


END_OF_TEXT = "<|endoftext|>"


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

    def to(self, device: str) -> Corpus:
        """The corpus with its held-out windows on `device`; those of training come step by step."""
        return replace(self, validation={domain: rows.to(device) for domain, rows in self.validation.items()})


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
        digest.update(digest_of(text))
    fingerprint = digest.hexdigest()[:16]
    path = Path(cache) / f"corpus-{fingerprint}.pt"
    if path.is_file():
        return _read(path)
    tokenizer = train_tokenizer([train for train, _ in splits.values()], vocab_size)
    train = {domain: windows(tokenizer, split[0], window) for domain, split in splits.items()}
    validation = {domain: windows(tokenizer, split[1], window) for domain, split in splits.items()}
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
    return _read(Path(cache) / f"corpus-{fingerprint}.pt")


def _read(path: Path) -> Corpus:
    try:
        return Corpus(**torch.load(path, weights_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:  # of as many kinds as there are ways to be damaged
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}); remove it, and it is made again.") from error


def train_tokenizer(parts: Sequence[Sequence[str]], vocab_size: int, digits_alone: bool = False):
    """A byte-level BPE tokenizer that knows equally much (by characters) of every part; each digit may be a token."""
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
    """Documents joined, with an end-of-text token after each, and cut into rows `(N, window)`; the rest is dropped."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False):
        ids += [*encoding.ids, end]
    count = len(ids) // window
    return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)
