"""Text files of named domains as token sequences, streamed: neither a file nor its tokens are ever held as a whole."""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast


TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # what is taken from a folder; each may be gzipped (.gz)
PIECE = 1 << 16  # characters that are tokenised at once


@dataclass(frozen=True)
class Domain:
    """
    A kind of text: some files under one name.

    Args:
        name (`str`): What it is called.
        files (`tuple[Path, ...]`): Its files, in the order they are read.
        fields (`tuple[str, ...]`, *optional*):
            Fields of a row of `.jsonl` that make up its text, joined by line ends; without any, the row is the text.
    """

    name: str
    files: tuple[Path, ...]
    fields: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of the files on disk."""
        return sum(path.stat().st_size for path in self.files)


def parse_domains(texts: Sequence[str], fields: Sequence[str] = ()) -> list[Domain]:
    """
    Domains from words such as `math=gsm8k/*.jsonl`, in the order of their first mention.

    Args:
        texts (`Sequence[str]`):
            `name=path` or `path`, whose stem is then the name. A path is a file, a glob (`**` descends), or a folder,
            of which all files with a suffix of `TEXT_SUFFIXES` are taken; several files are mixed, always alike. A name may come several times.
        fields (`Sequence[str]`, *optional*):
            `field` for every domain, or `name=field` for one of them; the only one that holds text in the first row, or
            `"text"`, if none is given.

    Raises:
        ValueError: if a path leads to no readable text, or a field belongs to no domain.
    """
    found: dict[str, dict[Path, None]] = {}  # dicts as ordered sets
    for text in texts:
        name, equals, pattern = text.partition("=")
        if not equals or Path(text).exists():
            name, pattern = Path(text).name.partition(".")[0] or text, text
        if not name or not pattern:
            raise ValueError(f"`--texts` {text!r} lacks a {'name' if pattern else 'path'}: write name=path.")
        found.setdefault(name, {}).update(dict.fromkeys(_files(pattern, text)))
    if not found:
        raise ValueError("there is no text to read: give `--texts name=path ...`.")
    own: dict[str, list[str]] = {name: [] for name in found}
    for entry in fields:
        name, equals, field = entry.partition("=")
        if equals and name not in own:
            raise ValueError(f"`--field` {entry!r} is for no domain of `--texts`, which are: {', '.join(own)}.")
        for owner in [name] if equals else own:
            own[owner].append(field if equals else name)
    return [
        Domain(name, tuple(files), _checked_fields(list(files), tuple(own[name]))) for name, files in found.items()
    ]


def _files(pattern: str, text: str) -> list[Path]:
    """Files of a path, in an order that is always the same, but mixed: the first of many are to be a fair sample."""
    path = Path(pattern)
    if path.is_dir():
        files = _mixed(p for p in path.rglob("*") if p.is_file() and _suffix(p) in TEXT_SUFFIXES)
        if not files:
            raise ValueError(
                f"`--texts` {text!r}: no file in that folder ends in {', '.join(TEXT_SUFFIXES)} (or .gz)."
            )
        return files
    files = (
        [path] if path.is_file() else _mixed(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
    )
    if not files:
        raise ValueError(f"`--texts` {text!r}: there is no such file or folder, and nothing matches it as a glob.")
    return files


def _mixed(paths: Iterable[Path]) -> list[Path]:
    ordered = sorted(paths)
    random.Random(0).shuffle(ordered)
    return ordered


def _suffix(path: Path) -> str:
    """Suffix of a file's name, without that of its compression."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _checked_fields(files: Sequence[Path], fields: tuple[str, ...]) -> tuple[str, ...]:
    """`fields`, or else what the first row says; refuses what reading would find out after the model has run for long."""
    for path in files:
        is_rows = _suffix(path) == ".jsonl"
        if _suffix(path) in TEXT_SUFFIXES and not is_rows:
            continue
        with path.open("rb") as raw:
            if not is_rows:
                if b"\0" in _binary(path, raw).read(1024):
                    raise ValueError(f"{path} is no text, it holds zero bytes: leave it out of `--texts`.")
                continue
            line = next((line for line in _text_of(path, raw) if line.strip()), None)
        if line is not None:
            try:
                row = json.loads(line)
                fields = fields or _only_field(row)
                _row_text(row, fields)
            except ValueError as error:
                raise ValueError(f"{path}, first row: {error}") from error
    return fields


class TextStream:
    """
    The sequences of token ids of one domain, and how far they have been read.

    Long documents are cut into sequences of `seq_len` tokens, short ones are sequences of their own: a sequence never
    holds two documents. Each begins with the special tokens that the tokenizer puts before a text; those are fed to
    the model as context and do not count.

    Args:
        domain (`Domain`): The files.
        tokenizer: A tokenizer of transformers.
        seq_len (`int`): Greatest length of a sequence, with its special tokens.
        max_tokens (`int`, *optional*): Stop after so many tokens of text.
    """

    def __init__(self, domain: Domain, tokenizer: Any, seq_len: int, max_tokens: int | None = None) -> None:
        self.domain = domain
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.prefix = leading_tokens(tokenizer)
        self.room = seq_len - len(self.prefix)  # tokens of text in a sequence
        if self.room < 1:
            raise ValueError(
                f"`seq_len` is {seq_len}: the tokenizer puts {len(self.prefix)} special token(s) first, so choose at "
                f"least {len(self.prefix) + 1}."
            )
        self.files = 0
        self.documents = 0
        self.sequences = 0
        self.tokens = 0
        self.skipped_rows = 0
        self.undecodable: list[str] = []  # files that are not all UTF-8
        self._bytes = 0  # of the files read to their ends
        self._raw: BinaryIO | None = None

    @property
    def progress(self) -> float:
        """Share of the work that is done, from 0 to 1, as far as it can be told."""
        is_open = self._raw is not None and not self._raw.closed
        read = self._bytes + (cast(BinaryIO, self._raw).tell() if is_open else 0)
        shares = [read / max(self.domain.bytes, 1)]
        if self.max_tokens is not None:
            shares.append(self.tokens / self.max_tokens)
        return min(max(shares), 1.0)

    def __iter__(self) -> Iterator[list[int]]:
        """Yields sequences: the special tokens, then at least one token of text."""
        for pieces in self._documents():
            held: list[int] = []
            is_new = True
            for piece in pieces:
                held += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
                self.documents += is_new and bool(held)
                is_new = is_new and not held
                whole = len(held) - len(held) % self.room
                for start in range(0, whole, self.room):
                    yield self._cut(held[start : start + self.room])
                    if self.tokens == self.max_tokens:
                        return
                held = held[whole:]
            if held:
                yield self._cut(held)
                if self.tokens == self.max_tokens:
                    return

    def _cut(self, ids: list[int]) -> list[int]:
        if self.max_tokens is not None:
            ids = ids[: self.max_tokens - self.tokens]
        self.tokens += len(ids)
        self.sequences += 1
        return [*self.prefix, *ids]

    def _documents(self) -> Iterator[Iterator[str]]:
        """Every document in pieces: a row of `.jsonl`, or a whole file of another kind."""
        for path in self.domain.files:
            self.files += 1
            with path.open("rb") as self._raw:
                if _suffix(path) == ".jsonl":
                    for text in _rows(path, self._raw, self.domain.fields):
                        self.skipped_rows += text is None
                        if text:
                            yield self._checked(path, iter([text]))
                else:
                    yield self._checked(path, _pieces(path, self._raw))
                self._bytes += path.stat().st_size
            self._raw = None

    def _checked(self, path: Path, pieces: Iterator[str]) -> Iterator[str]:
        for piece in pieces:
            if "\ufffd" in piece and str(path) not in self.undecodable:
                self.undecodable.append(str(path))
            yield piece

    def batches(self, batch_size: int, window: int = 16) -> Iterator[list[list[int]]]:
        """
        Sequences in batches; within `window` batches they are sorted by length, so that little is padded.

        Args:
            batch_size (`int`): Sequences of a batch.
            window (`int`, *optional*, defaults to `16`): Batches that are held at once.
        """
        sequences = iter(self)
        while held := sorted(itertools.islice(sequences, window * batch_size), key=len, reverse=True):
            yield from (held[start : start + batch_size] for start in range(0, len(held), batch_size))


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that `tokenizer` puts before a text, e.g. `[bos]`, without those that it puts after it."""
    alone = tokenizer("", verbose=False)["input_ids"]
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id, tokenizer.cls_token_id, None}
    return list(itertools.takewhile(lambda token: token not in ends, alone))


def _binary(path: Path, raw: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw


def _text_of(path: Path, raw: BinaryIO) -> io.TextIOWrapper:
    return io.TextIOWrapper(_binary(path, raw), encoding="utf-8-sig", errors="replace")


def _pieces(path: Path, raw: BinaryIO) -> Iterator[str]:
    """A text in pieces that end with a line, unless the line is very long."""
    text = _text_of(path, raw)
    while piece := text.read(PIECE):
        yield piece + text.readline(PIECE)
    text.detach()


def _rows(path: Path, raw: BinaryIO, fields: Sequence[str]) -> Iterator[str | None]:
    """The text of every row; `None` for a row that has none."""
    lines = _text_of(path, raw)
    for line in lines:
        if line.strip():
            try:
                yield _row_text(json.loads(line), fields)
            except ValueError:
                yield None
    lines.detach()


def _texts_in(row: Any) -> list[str]:
    """Names of the fields of a row that hold text."""
    if not isinstance(row, Mapping):
        raise ValueError("the row is no JSON object.")
    return [name for name, value in row.items() if isinstance(value, str)]


def _only_field(row: Any) -> tuple[str, ...]:
    """The field that is the text of a row, if there is no doubt; none if the row itself is the text."""
    if isinstance(row, str):
        return ()
    texts = _texts_in(row)
    if "text" in texts:
        return ("text",)
    if len(texts) != 1:
        raise ValueError(f"say by `--field` which field is the text; there is some in {', '.join(texts) or 'none'}.")
    return (texts[0],)


def _row_text(row: Any, fields: Sequence[str]) -> str:
    if isinstance(row, str) and not fields:
        return row
    texts = _texts_in(row)
    missing = [name for name in fields if name not in texts]
    if missing:
        raise ValueError(f"no text in field {missing[0]!r}; there is some in {', '.join(texts) or 'none'}.")
    return "\n".join(row[name] for name in fields)
