"""Texts as token sequences: paths of every kind, rows and letters that cannot be read, and streaming."""

import gzip
import json
import math
import tracemalloc

from made_texts import make_tokenizer
from tiny import tiny_model

from hf_phibalance.inspection import Domain, inspect_model, parse_domains
from hf_phibalance.inspection.texts import TextStream


def test_text_is_streamed(tmp_path):
    """A megabyte on one line, and in 15,000 rows, is read in far less memory."""

    class Letters:
        bos_token_id = eos_token_id = cls_token_id = sep_token_id = None

        def __call__(self, text, **kwargs):
            return {"input_ids": list(text.encode())}

    (tmp_path / "line.txt").write_text("x" * 1_000_000)
    (tmp_path / "rows.jsonl").write_text((json.dumps({"text": "y" * 68}) + "\n") * 15_000)
    domain = Domain("all", (tmp_path / "line.txt", tmp_path / "rows.jsonl"), ("text",))
    stream = TextStream(domain, Letters(), 64, max_tokens=2_000_000)
    tracemalloc.start()
    shares = [stream.progress for _ in stream.batches(8)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stream.tokens == 2_000_000 and stream.documents == 1 + math.ceil(1_000_000 / 68)
    assert peak < 4_000_000  # a list of all ids alone would take 16
    assert shares == sorted(shares) and 0 < shares[0] < 0.1 and shares[-1] == 1.0


def test_paths_of_every_kind(tmp_path):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    for name in ("src/b.py", "src/a.md", "src/deep/c.txt", "src/image.png", "notes.rst"):
        (tmp_path / name).write_text("w3")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write('"w4 w5"\n')

    def names(*texts):
        found = {d.name: [str(p.relative_to(tmp_path)) for p in d.files] for d in parse_domains(texts)}
        again = {d.name: [str(p.relative_to(tmp_path)) for p in d.files] for d in parse_domains(texts)}
        assert again == found
        return {name: sorted(files) for name, files in found.items()}

    assert names(f"code={tmp_path}/src") == {"code": ["src/a.md", "src/b.py", "src/deep/c.txt"]}
    assert names(f"x={tmp_path}/src/*.py", f"x={tmp_path}/notes.rst") == {"x": ["notes.rst", "src/b.py"]}
    assert names(f"x={tmp_path}/**/*.txt", f"{tmp_path}/rows.jsonl.gz") == {
        "x": ["src/deep/c.txt"],
        "rows": ["rows.jsonl.gz"],
    }
    (rows,) = parse_domains([f"{tmp_path}/rows.jsonl.gz"])
    assert list(TextStream(rows, make_tokenizer(), 8)) == [[4, 5]]


def test_bad_rows_and_letters_are_skipped_and_told(tmp_path, texts):
    rows = ['{"text": "w3 w4"}', "", "not json", '{"other": "w5"}', '{"text": ""}', '{"text": "w6"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "latin.txt").write_bytes(b"w3 caf\xe9 w4")
    domains = parse_domains([f"a={tmp_path}/rows.jsonl", f"b={tmp_path}/latin.txt"])
    found = inspect_model(tiny_model("mixtral"), make_tokenizer(), domains)
    assert found.domains["a"] == {"tokens": 3, "sequences": 2, "documents": 2, "files": 1, "files_read": 1}
    assert found.domains["b"]["tokens"] == 3
    assert any("2 rows of a" in note for note in found.notes) and any("latin.txt" in note for note in found.notes)
