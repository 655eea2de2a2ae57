"""
The contamination guard: test problems of GSM8K and HumanEval in rows that are to be trained on.

The package ships fingerprints of these problems, not their text, in `fingerprints.json`: for every text (question and
worked answer of GSM8K; description, docstring, prompt, solution and tests of HumanEval) the number of its words and two
hashes, one of its first words and one of all. Words are runs of letters and digits of the NFKC form in lower case,
without the `<<...>>` of GSM8K. A row is dropped if one of its fields is such a text, or holds one of at least
`MIN_EMBEDDED_WORDS` words. Paraphrases and problems with other numbers are not found.

The file covers what it was made from (see `fingerprints.py`), the first 1,000 of the 1,319 test problems of GSM8K and
all of HumanEval. [`load_rows`] adds the others where they are at hand: from `test.jsonl` in the folder of the training
rows or, if these come from the Hub, from there.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .table import Row, get_task


FINGERPRINTS = Path(__file__).with_name("fingerprints.json")
WINDOW = 8  # words of a problem whose hash starts a comparison
MIN_WORDS = 4  # shorter texts are no evidence
MIN_EMBEDDED_WORDS = 12  # shorter ones are, but only as a whole field


def normalise(text: str) -> list[str]:
    """The words of a text by which problems are compared: letters and digits of its NFKC form in lower case."""
    text = re.sub(r"<<.*?>>", "", text)
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def _hash_all(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest()


def _hash_first(words: Sequence[str]) -> int:
    return zlib.crc32(" ".join(words).encode())


class Fingerprints:
    """
    Texts by which problems are recognised, kept as hashes.

    An entry is the number of words, a 4-byte hash of the first `WINDOW` of them, and an 8-byte hash of all.
    """

    ENTRY = struct.Struct("<HI8s")

    def __init__(self) -> None:
        self.whole: dict[bytes, str] = {}  # hash of all words: benchmark
        self.starts: dict[int, set[int]] = {}  # hash of the first words: numbers of words
        self.entries: dict[str, set[tuple[int, int, bytes]]] = {}  # by benchmark

    def copy(self) -> Fingerprints:
        other = Fingerprints()
        for name, entries in self.entries.items():
            for entry in entries:
                other._add(name, entry)
        return other

    def add(self, benchmark: str, text: str) -> None:
        words = normalise(text)
        if MIN_WORDS <= len(words) < 2**16:
            self._add(benchmark, (len(words), _hash_first(words[:WINDOW]), _hash_all(words)))

    def _add(self, benchmark: str, entry: tuple[int, int, bytes]) -> None:
        length, start, whole = entry
        self.entries.setdefault(benchmark, set()).add(entry)
        self.whole.setdefault(whole, benchmark)
        if length >= MIN_EMBEDDED_WORDS:
            self.starts.setdefault(start, set()).add(length)

    def find(self, row: Row) -> str | None:
        """The benchmark of which a field of the row holds a problem, or `None`."""
        for text in _fields(row):
            words = normalise(text)
            if len(words) >= MIN_WORDS and (found := self.whole.get(_hash_all(words))) is not None:
                return found
            for first in range(len(words) - MIN_EMBEDDED_WORDS + 1):
                for length in self.starts.get(_hash_first(words[first : first + WINDOW]), ()):
                    part = words[first : first + length]
                    if len(part) == length and (found := self.whole.get(_hash_all(part))) is not None:
                        return found
        return None

    def to_json(self, sources: Mapping[str, Any]) -> str:
        """The file: `sources` says, by benchmark, what it was made from."""
        benchmarks = {
            name: {
                "made_from": sources[name],
                "entries": base64.b64encode(b"".join(self.ENTRY.pack(*entry) for entry in sorted(entries))).decode(),
            }
            for name, entries in self.entries.items()
        }
        form = "words (u16), crc32 of the first words (u32), blake2b-64 of all words; little-endian, base64"
        content = {"entry": form, "first_words": WINDOW, "benchmarks": benchmarks}
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Fingerprints:
        fingerprints, content = cls(), json.loads(text)
        if content["first_words"] != WINDOW:
            raise ValueError(
                f"the fingerprints were made with first_words={content['first_words']}, this version reads {WINDOW}: "
                "make them anew with python -m hf_phibalance.tasks.fingerprints."
            )
        for name, benchmark in content["benchmarks"].items():
            for entry in cls.ENTRY.iter_unpack(base64.b64decode(benchmark["entries"])):
                fingerprints._add(name, entry)
        return fingerprints


def _fields(row: Row) -> Iterator[str]:
    """The texts of a row: strings, and lists of strings (tests, messages) put together."""
    for value in row.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _fields(dict(value))
        elif isinstance(value, (list, tuple)):
            yield "\n".join(item for item in value if isinstance(item, str))
            for item in value:
                if isinstance(item, Mapping):
                    yield from _fields(dict(item))


@functools.cache
def shipped_fingerprints() -> Fingerprints:
    """Those of the package: test problems of GSM8K, and HumanEval."""
    return Fingerprints.from_json(FINGERPRINTS.read_text())


def drop_contaminated(rows: Iterable[Row], task: str) -> tuple[list[Row], list[Row]]:
    """
    Parts rows from those that hold a test problem of GSM8K or HumanEval. `load_rows` has done so.

    Args:
        rows (`Iterable[dict]`): rows of any form; all their texts are searched.
        task (`str`): what is trained, one of `TASKS`; of a task for evaluation only, nothing is kept.

    Returns:
        `tuple[list[dict], list[dict]]`: kept and dropped.
    """
    trains, guard = get_task(task).trains, shipped_fingerprints()
    kept: list[Row] = []
    dropped: list[Row] = []
    for row in rows:
        (kept if trains and guard.find(row) is None else dropped).append(row)
    return kept, dropped
