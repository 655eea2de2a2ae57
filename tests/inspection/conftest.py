"""What the tests of inspection share: two domains of text."""

import json

import pytest
from made_texts import words


@pytest.fixture
def texts(tmp_path):
    """Two domains of uneven documents over different halves of the vocabulary; words of `--texts` and their tokens."""
    rows = [words(length, last=66, seed=length) for length in (3, 30, 7, 1, 12, 25, 11)]
    (tmp_path / "low.jsonl").write_text("".join(json.dumps({"id": "x", "body": row}) + "\n" for row in rows))
    long = words(80, first=64)
    (tmp_path / "high.txt").write_text(long.replace(" w9", "\nw9"))

    def ids(text):
        return [int(word[1:]) for word in text.split()]

    documents = {"low": [ids(row) for row in rows], "high": [ids(long)]}
    return [f"low={tmp_path}/low.jsonl", f"high={tmp_path}/high.txt"], documents
