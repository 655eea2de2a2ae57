"""Cuts the texts of named domains into sequences of token ids. Files are streamed."""

from __future__ import annotations

import glob
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

from ..files import printable, quoted
from .rows import COMPRESSED, TABLES, fields_of, read_rows, suffix_of, text_of


IN_FOLDERS = (".txt", ".md", ".py", ".jsonl", ".parquet")  # other .json and .csv lie beside code
PIECE = 1 << 16  # characters that are tokenised at once


@dataclass(frozen=True)
class Domain:
    """Files under one name; `fields` are the text of their rows, the usual ones if none are given."""

    name: str
    files: tuple[Path, ...]
    fields: tuple[str, ...] = ()


def parse_domains(texts: Sequence[str], fields: Sequence[str] = ()) -> list[Domain]:
    """
    Returns the domains that words such as `math=gsm8k/*.jsonl` name, in the order of their first mention.

    Args:
        texts (`Sequence[str]`):
            `name=path`, or `path`, whose stem is then the name. A path is a file, a glob (`**` descends), or a folder, of which the
            files in `IN_FOLDERS` are taken. Several files are mixed, always in the same way. A name may come several times.
        fields (`Sequence[str]`, *optional*): `field` for every domain, or `name=field` for one of them.

    Raises:
        ValueError: if a path leads to no file or to a binary one, or a field belongs to no domain.
    """
    found: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, pattern = text.partition("=")
        if not equals or os.path.exists(text):
            name, pattern = Path(text).name.partition(".")[0] or text, text
        if not name or not pattern or name == "overall":
            raise ValueError(f"`--texts` {quoted(text)}: write name=path, but not 'overall', which is all domains.")
        found.setdefault(printable(name), []).extend(_files(pattern, text))
    own: dict[str, list[str]] = {name: [] for name in found}
    for entry in fields:
        owner, _, field = entry.rpartition("=")
        if owner and printable(owner) not in own:
            raise ValueError(f"`--field` {quoted(entry)} is for no domain of `--texts`, which are: {', '.join(own)}.")
        for name in [printable(owner)] if owner else own:
            own[name].append(field)
    return [Domain(name, tuple(dict.fromkeys(files)), tuple(own[name])) for name, files in found.items()]


def _files(pattern: str, text: str) -> list[Path]:
    """Returns the files of a path, mixed, so that the first of many are a fair sample."""
    path = Path(pattern)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and suffix_of(file) in IN_FOLDERS]
        reason = f"no file in that folder ends in {', '.join(IN_FOLDERS)} (or .gz)"
    else:
        files = [file for file in {path, *map(Path, glob.glob(pattern, recursive=True))} if file.is_file()]
        reason = "there is no such file or folder, and nothing matches it as a glob"
    if not files:
        raise ValueError(f"`--texts` {quoted(text)}: {reason}.")
    for file in files:
        if file.suffix not in (*TABLES, *COMPRESSED) and b"\0" in file.open("rb").read(1024):
            raise ValueError(f"{quoted(str(file))} is no text, it holds zero bytes: leave it out of `--texts`.")
    return random.Random(0).sample(sorted(files), len(files))


class TextStream:
    """
    The sequences of token ids of one domain, and how far they have been read.

    A text is a row of a table (.jsonl, .json, .csv, .parquet) or a whole file of another kind. It is cut into sequences, none of
    which holds two texts. With `packing`, the texts of the domain are joined by line ends and cut as one. A sequence begins with
    the special tokens that the tokenizer puts before a text. The model sees them, but they do not count.

    Args:
        domain (`Domain`): the files.
        tokenizer: a tokenizer of transformers.
        seq_len (`int`): greatest length of a sequence, with its special tokens.
        max_tokens (`int`, *optional*): stop after so many tokens of text.
        packing (`bool`, *optional*, defaults to `False`): whether texts share sequences.
    """

    def __init__(
        self, domain: Domain, tokenizer: Any, seq_len: int, max_tokens: int | None = None, packing: bool = False
    ) -> None:
        self.domain, self.tokenizer, self.packing = domain, tokenizer, packing
        self.max_tokens = sys.maxsize if max_tokens is None else max_tokens
        self.prefix = leading_tokens(tokenizer)
        self.room = seq_len - len(self.prefix)  # tokens of text in a sequence
        if self.room < 1:
            raise ValueError(
                f"`seq_len` is {seq_len}: choose more than the {len(self.prefix)} special token(s) in front."
            )
        self.files = self.documents = self.sequences = self.tokens = 0
        self.skipped = 0  # rows without text
        self.undecodable: set[str] = set()  # names of files that are not all UTF-8

    def __iter__(self) -> Iterator[list[int]]:
        """Yields sequences: the special tokens, then at least one token of text."""
        texts = self._texts()
        for text in [chain.from_iterable(texts)] if self.packing else texts:
            tokenized = (self.tokenizer(piece, add_special_tokens=False, verbose=False) for piece in _pieces(text))
            ids, before = chain.from_iterable(part["input_ids"] for part in tokenized), self.sequences
            while sequence := list(islice(ids, min(self.room, self.max_tokens - self.tokens))):
                self.documents += self.sequences == before
                self.sequences += 1
                self.tokens += len(sequence)
                yield [*self.prefix, *sequence]
            if self.tokens == self.max_tokens:
                return

    def _texts(self) -> Iterator[Iterable[str]]:
        """Yields each text: that of a row, or the lines of a file. Skips rows without text, but refuses the very first."""
        for path in self.domain.files:
            self.files += 1
            if suffix_of(path) not in TABLES:
                yield self._lines(path)
                continue
            fields = self.domain.fields
            for number, row in enumerate(read_rows(path)):
                try:
                    fields = fields or fields_of(row)
                    text = text_of(row, fields, self.tokenizer)
                except ValueError as error:
                    if number == 0 and not self.tokens:
                        raise ValueError(f"{quoted(str(path))}, first row: {error}") from error
                    self.skipped += 1
                    continue
                if self.prefix:  # which a chat template may have written
                    text = text.removeprefix(self.tokenizer.decode(self.prefix))
                yield [text, "\n"] if self.packing else [text]

    def _lines(self, path: Path) -> Iterator[str]:
        for row in read_rows(path):
            if "\ufffd" in row["text"]:
                self.undecodable.add(path.name)
            yield row["text"]

    def batches(self, batch_size: int, window: int = 16) -> Iterator[list[list[int]]]:
        """Yields batches of sequences. Within `window` batches they are sorted by length, so that little is padded."""
        sequences = iter(self)
        while held := sorted(islice(sequences, window * batch_size), key=len, reverse=True):
            yield from (held[start : start + batch_size] for start in range(0, len(held), batch_size))


def check_texts(domains: Sequence[Domain], tokenizer: Any) -> None:
    """Raises what reading the first text of each domain raises, so that no model is loaded in vain."""
    for domain in domains:
        if not any(TextStream(domain, tokenizer, seq_len=PIECE)):
            raise ValueError(f"there is no text in domain {domain.name}.")


def leading_tokens(tokenizer: Any) -> list[int]:
    """Returns the special tokens that `tokenizer` puts before a text, e.g. `[bos]`, without those that it puts after it."""
    alone = tokenizer("", verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id, tokenizer.cls_token_id, None}
    return list(takewhile(lambda token: token not in ends, alone))


def _pieces(strings: Iterable[str]) -> Iterator[str]:
    """Yields `strings` joined to pieces of at least `PIECE` characters."""
    held = ""
    for string in strings:
        held += string
        if len(held) >= PIECE:
            yield held
            held = ""
    yield held
