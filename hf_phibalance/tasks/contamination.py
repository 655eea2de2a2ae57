"""
Finds test problems of GSM8K and HumanEval in training rows.

The package ships hashes of these problems in `fingerprints.json`, not their text. They cover the question and the
worked answer of GSM8K, and the description, docstring, prompt, solution and tests of HumanEval. Texts are compared as
lower-case words: runs of letters and digits in NFKC form, without GSM8K's `<<...>>`. A row is dropped if one of its
fields equals such a text, or contains one of at least `MIN_EMBEDDED_WORDS` words. Misses paraphrases and new numbers.

The file covers the first 1,000 of the 1,319 test problems of GSM8K and all of HumanEval. [`load_rows`] adds the other
problems of GSM8K from `test.jsonl` beside the training rows, or from the Hub if the rows come from there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .table import Row, get_task


FINGERPRINTS = Path(__file__).with_name("fingerprints.json")
WINDOW = 8  # if the hash of this many first words matches, all words are compared
MIN_WORDS = 4  # shorter texts are ignored
MIN_EMBEDDED_WORDS = 12  # shorter texts must be a whole field


def normalise(text: str) -> list[str]:
    """Returns the words by which texts are compared: letters and digits of the NFKC form in lower case."""
    text = re.sub(r"<<.*?>>", "", text)
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def _hash_all(words: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def _hash_first(words: Sequence[str]) -> int:
    return zlib.crc32(" ".join(words[:WINDOW]).encode())


class Fingerprints:
    """Hashes by which problems are recognised."""

    def __init__(self) -> None:
        self.problems: dict[int, str] = {}  # hash of all words: benchmark
        self.lengths: dict[int, set[int]] = {}  # hash of the first words: numbers of words

    def add(self, benchmark: str, length: int, first: int, whole: int) -> None:
        self.problems.setdefault(whole, benchmark)
        if length >= MIN_EMBEDDED_WORDS:
            self.lengths.setdefault(first, set()).add(length)

    def find(self, row: Row) -> str | None:
        """Returns the benchmark that has a problem in a field of the row, or `None`."""
        for text in _fields(row):
            words = normalise(text)
            if len(words) >= MIN_WORDS and (found := self.problems.get(_hash_all(words))):
                return found
            for start in range(len(words) - MIN_EMBEDDED_WORDS + 1):
                for length in self.lengths.get(_hash_first(words[start : start + WINDOW]), ()):
                    part = words[start : start + length]
                    if len(part) == length and (found := self.problems.get(_hash_all(part))):
                        return found
        return None


def fingerprints_of(task: str, rows: Iterable[Row]) -> set[tuple[int, int, int]]:
    """Returns (word count, hash of the first words, hash of all words) of each text of the test problems."""
    texts = [normalise(text) for row in rows for text in get_task(task).texts(row)]
    return {(len(words), _hash_first(words), _hash_all(words)) for words in texts if len(words) >= MIN_WORDS}


@functools.cache
def shipped_fingerprints() -> Fingerprints:
    """Returns the fingerprints that come with the package."""
    fingerprints = Fingerprints()
    for name, benchmark in json.loads(FINGERPRINTS.read_text()).items():
        for entry in benchmark["entries"]:
            fingerprints.add(name, *entry)
    return fingerprints


def _fields(row: Mapping) -> Iterator[str]:
    """Yields the texts of a row. The texts of a list (tests) are joined."""
    for value in row.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _fields(value)
        elif isinstance(value, (list, tuple)):
            yield "\n".join(item for item in value if isinstance(item, str))
            for item in value:
                if isinstance(item, Mapping):
                    yield from _fields(item)
