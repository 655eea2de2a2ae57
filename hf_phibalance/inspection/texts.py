"""Reads the texts of named domains as sequences of token ids. Files are streamed by `datasets`."""

from __future__ import annotations

import glob
import os
import random
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch

from ..files import printable, quoted


LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # of datasets, for tables
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
IN_FOLDERS = (".txt", ".md", ".py", ".jsonl", ".parquet")  # .json and .csv in a folder are rarely texts
LINES = {"keep_linebreaks": True, "encoding": "utf-8-sig", "encoding_errors": "replace"}
USUAL_FIELDS = (("text",), ("messages",), ("prompt", "completion"), ("question", "answer"))
PIECE = 1 << 16  # characters to tokenize at once


@dataclass(frozen=True)
class Domain:
    """Files under one name. `fields` are the columns with text; if empty, the usual ones are tried."""

    name: str
    files: tuple[Path, ...]
    fields: tuple[str, ...] = ()


def parse_domains(texts: str | Sequence[str], fields: str | Sequence[str] = ()) -> list[Domain]:
    """
    Parses arguments like `math=gsm8k/*.jsonl` into domains, in the order of their first mention.

    Args:
        texts (`str` or `Sequence[str]`):
            `name=path`, or `path`, whose stem is then the name. A path is a file, a glob (`**` descends), or a folder: its files that
            end in one of `IN_FOLDERS` are read. Names may repeat. A domain's files are shuffled with a fixed seed.
        fields (`str` or `Sequence[str]`, *optional*): `field` for all domains, or `name=field` for one.

    Raises:
        ValueError: if a path has no file or a binary one, or if a field is for no domain.
    """
    texts, fields = ([one] if isinstance(one, str) else one for one in (texts, fields))
    found: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, pattern = text.partition("=")
        if not equals or os.path.exists(text):
            name, pattern = Path(text).name.partition(".")[0] or text, text
        if not name or not pattern or name == "overall":
            raise ValueError(
                f"`--texts` {quoted(text)}: write name=path, with a name other than 'overall' (all domains)."
            )
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
    """Returns the files of a path, shuffled, so that the first of many files are a fair sample."""
    path = Path(pattern)
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and _suffix(file) in IN_FOLDERS]
        reason = f"no file in that folder ends in {', '.join(IN_FOLDERS)} (or .gz)"
    else:
        files = [file for file in {path, *map(Path, glob.glob(pattern, recursive=True))} if file.is_file()]
        reason = "there is no such file or folder, and nothing matches it as a glob"
    if not files:
        raise ValueError(f"`--texts` {quoted(text)}: {reason}.")
    for file in files:
        if file.suffix not in (*LOADERS, *COMPRESSED) and b"\0" in file.open("rb").read(1024):
            raise ValueError(f"{quoted(str(file))} is no text, it holds zero bytes: leave it out of `--texts`.")
    return random.Random(0).sample(sorted(files), len(files))


class TextStream:
    """
    Iterates over the sequences of token ids of one domain, and counts what it has read.

    A text is a row of a table (.jsonl, .json, .csv, .parquet), or a whole file of any other kind. Each text is cut into its own
    sequences. With `packing`, the texts of the domain are joined by line ends first. A sequence begins with the special tokens
    that the tokenizer puts before a text. They are not counted.

    Args:
        domain (`Domain`): The files.
        tokenizer: A tokenizer of transformers.
        seq_len (`int`): Longest sequence in tokens, special tokens included.
        max_tokens (`int`, *optional*): Tokens of text to stop after.
        packing (`bool`, *optional*, defaults to `False`): Whether texts share sequences.
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
        self.checksum = 0  # CRC-32 of the token ids
        self.skipped = 0  # rows without text
        self.undecodable: set[str] = set()  # names of files that are not all UTF-8

    def __iter__(self) -> Iterator[list[int]]:
        """Yields sequences: the special tokens, then at least one token of text."""
        texts = self._texts()
        for text in [chain.from_iterable(texts)] if self.packing else texts:
            ids, before = self._ids(text), self.sequences
            while sequence := list(islice(ids, min(self.room, self.max_tokens - self.tokens))):
                self.documents += self.sequences == before
                self.sequences += 1
                self.tokens += len(sequence)
                self.checksum = zlib.crc32(array("I", sequence), self.checksum)
                yield [*self.prefix, *sequence]
            if self.tokens == self.max_tokens:
                return

    def _ids(self, text: Iterable[str]) -> Iterator[int]:
        """Yields the token ids of a text in parts."""
        tokenized = (self.tokenizer(piece, add_special_tokens=False, verbose=False) for piece in _pieces(text))
        return chain.from_iterable(part["input_ids"] for part in tokenized)

    def first_texts(self, count: int, tokens: int) -> list[list[int]]:
        """Returns the first `tokens` token ids, or as many as a sequence holds, of each of the first `count` texts."""
        own = TextStream(self.domain, self.tokenizer, self.room + len(self.prefix))  # the counts of this one stay
        texts = (list(islice(own._ids(text), min(tokens, self.room))) for text in own._texts())
        return list(islice(filter(None, texts), count))

    def _texts(self) -> Iterator[Iterable[str]]:
        """Yields each text in parts: a row, or a file's lines. Skips rows without text. Raises for a bad first row."""
        for path in self.domain.files:
            self.files += 1
            if _suffix(path) not in LOADERS:
                yield self._lines(path)
                continue
            fields = self.domain.fields
            for number, row in enumerate(_rows(path)):
                try:
                    fields = fields or _usual_fields(row)
                    text = _text(row, fields, self.tokenizer)
                except ValueError as error:
                    if number == 0 and not self.tokens:
                        raise ValueError(f"{quoted(str(path))}, first row: {error}") from error
                    self.skipped += 1
                    continue
                if self.prefix:  # a chat template may already have added it
                    text = text.removeprefix(self.tokenizer.decode(self.prefix))
                yield [text, "\n"] if self.packing else [text]

    def _lines(self, path: Path) -> Iterator[str]:
        for row in _rows(path):
            if "\ufffd" in row["text"]:
                self.undecodable.add(path.name)
            yield row["text"]

    def batches(self, batch_size: int, window: int = 16) -> Iterator[list[list[int]]]:
        """Yields batches of sequences, sorted by length within `window` batches to save padding."""
        sequences = iter(self)
        while held := sorted(islice(sequences, window * batch_size), key=len, reverse=True):
            yield from (held[start : start + batch_size] for start in range(0, len(held), batch_size))


def check_texts(domains: Sequence[Domain], tokenizer: Any) -> None:
    """Reads the first text of each domain and raises its errors, before a model is loaded."""
    for domain in domains:
        if not any(TextStream(domain, tokenizer, seq_len=PIECE)):
            raise ValueError(f"there is no text in domain {domain.name}.")


def check_same_ids(
    domains: Sequence[Domain], tokenizers: Sequence[Any], models: Sequence[str], max_tokens: int | None
) -> None:
    """Raises if the two `tokenizers` turn the texts into different token ids. `models` are the names of their models."""
    for domain in domains:
        streams = (TextStream(domain, tokenizer, PIECE, max_tokens) for tokenizer in tokenizers)
        if any(one != other for one, other in zip_longest(*streams)):
            raise ValueError(
                f"the tokenizers of {' and '.join(map(quoted, models))} make different tokens of {domain.name}: compare models with "
                "the same tokenizer, or name one for both with `--tokenizer`."
            )


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds to those before it. Empty for a token that ends within a character."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False).rstrip("\ufffd")
        found.append(text[len(before) :])
        before = text
    return found


def leading_tokens(tokenizer: Any) -> list[int]:
    """Returns the special tokens that `tokenizer` puts before a text, e.g. `[bos]`."""
    alone = tokenizer("", verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id, tokenizer.cls_token_id, None}
    return list(takewhile(lambda token: token not in ends, alone))


def padded_batches(sequences: Sequence[Sequence[int]], batch_size: int, pad: int) -> list[dict[str, Any]]:
    """Returns right-padded batches of `batch_size` sequences, with attention mask and labels."""
    batches = []
    for start in range(0, len(sequences), batch_size):
        part = [torch.tensor(row) for row in sequences[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=pad)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in part])[:, None]
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)})
    return batches


def padding_of(tokenizer: Any) -> int:
    """Returns a token id to pad with. The attention mask hides it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _pieces(strings: Iterable[str]) -> Iterator[str]:
    """Joins `strings` into pieces of at least `PIECE` characters."""
    held = ""
    for string in strings:
        held += string
        if len(held) >= PIECE:
            yield held
            held = ""
    yield held


def _suffix(path: Path) -> str:
    """Returns the suffix of a file's name, without a compression suffix."""
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix.lower()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table, or the lines of any other file as rows with `text`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError('reading texts needs datasets: pip install "hf_phibalance[texts]"') from error
    loader = LOADERS.get(_suffix(path), "text")
    options = LINES if loader == "text" else {}
    if not path.stat().st_size:
        return
    try:
        yield from load_dataset(loader, data_files=glob.escape(str(path)), split="train", streaming=True, **options)
    except Exception as error:  # each loader and codec raises its own
        reason = f"{quoted(str(path))} cannot be read as {loader}: {quoted(str(error))}"
        raise ValueError(f"{reason}. Repair it, or leave it out of `--texts`.") from error


def _filled(row: Mapping[str, Any]) -> list[str]:
    """Returns the names of the fields with text or messages."""

    def is_chat(value: Any) -> bool:
        return isinstance(value, list) and value != [] and all(isinstance(m, Mapping) and "role" in m for m in value)

    return [name for name, value in row.items() if isinstance(value, str) or is_chat(value)]


def _usual_fields(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the first of `USUAL_FIELDS` that the row has, or else its only field with text."""
    filled = _filled(row)
    usual = [names for names in USUAL_FIELDS if set(names) <= set(filled)]
    if not usual and len(filled) != 1:
        raise ValueError(f"say by `--field` which field is the text; there is some in {quoted(filled)}.")
    return usual[0] if usual else (filled[0],)


def _text(row: Mapping[str, Any], fields: tuple[str, ...], tokenizer: Any) -> str:
    """Returns the `fields` of a row joined by line ends, or its messages through the chat template of `tokenizer`."""
    filled = _filled(row)
    for name in fields:
        if name not in filled:
            raise ValueError(f"there is no text in field {quoted(name)}, but in {quoted(filled)}.")
    values = [row[name] for name in fields]
    if all(isinstance(value, str) for value in values):
        return ("" if fields == ("prompt", "completion") else "\n").join(values)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"field {quoted(fields[0])} holds messages, but the tokenizer {quoted(tokenizer.name_or_path)} has no chat "
            "template: name a tokenizer with one (`--tokenizer`), or a field of plain text (`--field`)."
        )
    try:  # tables fill in missing keys of messages with null
        messages = [{k: v for k, v in message.items() if v is not None} for value in values for message in value]
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates may raise anything
        raise ValueError(f"the tokenizer's chat template does not take the messages: {quoted(str(error))}.") from error
