"""Texts as token sequences: paths and tables of every kind, chats, packing, what cannot be read, and streaming."""

import gzip
import io
import json
import lzma
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hostile import CALM, damaged
from hypothesis import given
from hypothesis import strategies as st
from made_texts import cut, make_tokenizer, words
from tiny import tiny_model

from hf_phibalance.inspection import Domain, TextStream, check_texts, inspect_model, parse_domains


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"


def read(path, seq_len=512, fields=(), **options):
    """The sequences of `path` as the words of the tokenizer, and the stream that made them."""
    (domain,) = parse_domains([f"x={path}"], fields)
    tokenizer = make_tokenizer()
    stream = TextStream(domain, tokenizer, seq_len, **options)
    return [tokenizer.decode(ids) for ids in stream], stream


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_paths_of_every_kind(tmp_path):
    (tmp_path / "src" / "deep").mkdir(parents=True)
    for name in ("src/b.py", "src/a.md", "src/deep/c.txt", "src/image.png", "src/d.json", "notes.rst", "a[1]*.txt"):
        (tmp_path / name).write_text("w3")

    def names(*texts):
        found = {d.name: [str(p.relative_to(tmp_path)) for p in d.files] for d in parse_domains(texts)}
        again = {d.name: [str(p.relative_to(tmp_path)) for p in d.files] for d in parse_domains(texts)}
        assert again == found
        return {name: sorted(files) for name, files in found.items()}

    assert names(f"code={tmp_path}/src") == {"code": ["src/a.md", "src/b.py", "src/deep/c.txt"]}
    assert names(f"x={tmp_path}/src/*.py", f"x={tmp_path}/notes.rst") == {"x": ["notes.rst", "src/b.py"]}
    found = names(f"x={tmp_path}/**/*.txt", f"{tmp_path}/src/d.json")
    assert found == {"x": ["a[1]*.txt", "src/deep/c.txt"], "d": ["src/d.json"]}
    assert read(f"{tmp_path}/a[1]*.txt")[0] == ["w3"]  # a name, not a pattern
    one = f"x={tmp_path / 'src'}"
    assert parse_domains(one) == parse_domains([one])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.JSONL", "a.json", "a.csv", "a.csv.gz", "a.parquet"])
def test_tables_of_every_kind(tmp_path, name):
    path, rows = tmp_path / name, [{"id": 1, "text": "w3"}, {"id": 2, "text": "w4 w5"}]
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "\n\n".join(map(json.dumps, rows))
        content = {"json": json.dumps(rows), "csv": "id,text\n1,w3\n2,w4 w5\n"}.get(name.split(".")[1], lines)
        (gzip.open if name.endswith("gz") else open)(path, "wt").write(content)
    assert read(path)[0] == ["w3", "w4 w5"]


def test_a_file_of_plain_text_is_one_text(tmp_path):
    text = "w3 w4\n\nw5 w6\r\nw7 w8 w9"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "a.md.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("a.txt", "a.md.xz"):
        found, stream = read(tmp_path / name, seq_len=3)
        assert found == ["w3 w4 w5", "w6 w7 w8", "w9"] and stream.documents == 1 and stream.tokens == 7


@pytest.mark.slow
def test_packed_rows_are_what_the_same_lines_are_as_plain_text(tmp_path):
    lines = [words(length, seed=length) for length in (3, 30, 7, 1, 12, 9000, 25)]
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    write_rows(tmp_path / "a.jsonl", [{"text": line} for line in lines])
    plain, _ = read(tmp_path / "a.txt", seq_len=20)
    packed, stream = read(tmp_path / "a.jsonl", seq_len=20, packing=True)
    alone, _ = read(tmp_path / "a.jsonl", seq_len=20)
    assert packed == plain != alone and stream.documents == 1
    assert alone == [" ".join(part) for part in cut([line.split() for line in lines], 20)]
    some = read(tmp_path / "a.jsonl", seq_len=20, packing=True, max_tokens=50)[0]
    assert some == [*plain[:2], " ".join(plain[2].split()[:10])]


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"text": "w3", "messages": "w4"}, (), "w3"),
        ({"prompt": "w3 ", "completion": "w4"}, (), "w3 w4"),
        ({"question": "w3", "answer": "w4", "id": "w5"}, (), "w3 w4"),
        ({"body": "w3", "id": 1}, (), "w3"),
        ({"question": "w3", "answer": "w4"}, ("answer",), "w4"),
        ({"a": "w3", "b": "w4"}, ("b", "a"), "w4 w3"),
    ],
)
def test_fields_that_are_the_text(tmp_path, row, fields, expected):
    assert read(write_rows(tmp_path / "a.jsonl", [row]), fields=fields)[0] == [expected]


def test_messages_go_through_the_chat_template(tmp_path):
    """Also those of a prompt and its completion. The template's own special tokens do not come twice."""
    tokenizer = make_tokenizer(bos=True)
    chat = [{"role": "w3", "content": "w4"}, {"role": "w5", "content": "w6", "tool_calls": None}]
    write_rows(tmp_path / "a.jsonl", [{"messages": chat}])
    write_rows(tmp_path / "b.jsonl", [{"prompt": chat[:1], "completion": chat[1:]}])
    (domain,) = parse_domains([f"x={tmp_path}"])
    with pytest.raises(ValueError, match=r"first row: field '\w+' holds messages.*no chat template.*--tok.*--field"):
        check_texts([domain], tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert list(TextStream(domain, tokenizer, 64)) == [[1, 3, 4, 5, 6]] * 2
    assert list(TextStream(domain, tokenizer, 64, packing=True)) == [[1, 3, 4, 5, 6, 3, 4, 5, 6]]
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].role) }}"
    with pytest.raises(ValueError, match=r"first row: the tokenizer's chat template does not take the .* 'no w3'"):
        check_texts([domain], tokenizer)


LONG = b"k" * 10**6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "there is no text in domain x"),
        ("a.jsonl", b'{"text": ""}\n', "there is no text in domain x"),
        ("a.bin", b"\x7fELF\0\0", "a.bin' is no text, it holds zero bytes"),
        ("a.jsonl", b"\x7fELF\0\0", "a.jsonl' cannot be read as json: 'JSON parse error"),
        ("a.jsonl", b'{"text": "w3"}\nnot json\n', "cannot be read as json: 'JSON parse error.*row 1.*Repair it"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "cannot be read as json: .*utf-8"),
        ("a.jsonl", b'{"text": "w3", "' + LONG + b'": 1, "' + LONG + b'": 1}', "cannot be read as json"),
        ("a.txt.gz", b"no gzip", "cannot be read as text: .*Not a gzipped file"),
        ("a.txt.gz", gzip.compress(b"w3 " * 999, mtime=0)[:20], "cannot be read as text"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.jsonl", b'{"a": 1}\n', r"first row: say by `--field`.*\[\]"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        check_texts(parse_domains([f"x={tmp_path / name}"]), make_tokenizer())
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


@pytest.mark.slow
@CALM
@given(data=st.data())
def test_any_damage_is_one_line_or_text(data, tmp_path_factory):
    """Also content of one kind under the name of another."""
    table, names = io.BytesIO(), ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.md.gz", "a.jsonl.gz"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["w3", "w4"]}), table)
    good = (b'{"text": "w3"}\n{"text": "w4"}\n', b"text,b\nw3,1\nw4,2\n", b'[{"text": "w3"}]', table.getvalue())
    content = data.draw(st.sampled_from(good).flatmap(damaged))
    path = tmp_path_factory.getbasetemp() / data.draw(st.sampled_from(names))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    try:
        read(path)
    except ValueError as error:
        assert len(str(error)) < 600 and str(error).isprintable() and path.name in str(error)


def test_a_missing_field_names_those_that_there_are(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"a": "w3", "b": "w4"}])
    with pytest.raises(ValueError, match=r"there is no text in field 'c', but in \['a', 'b'\]"):
        read(path, fields=["c"])


def test_bad_rows_and_letters_are_skipped_and_told(tmp_path):
    rows = [{"text": "w3 w4"}, {"other": "w5"}, {"text": ""}, {"text": None}, {"text": "w6"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "latin.txt").write_bytes(b"w3 caf\xe9 w4")
    domains = parse_domains([f"a={tmp_path}/rows.jsonl", f"b={tmp_path}/latin.txt"])
    found = inspect_model(tiny_model("mixtral"), make_tokenizer(), domains)
    expected = {"tokens": 3, "sequences": 2, "documents": 2, "files": 1, "files_read": 1}
    assert {name: found.domains["a"][name] for name in expected} == expected
    assert found.domains["b"]["tokens"] == 3
    assert any("2 rows of a" in note for note in found.notes) and any("latin.txt" in note for note in found.notes)


def test_short_sequences_are_told(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": words(4, seed=seed)} for seed in range(64)])
    domains, model = parse_domains([f"a={tmp_path}/a.jsonl"]), tiny_model("mixtral")
    alone = inspect_model(model, make_tokenizer(), domains, seq_len=32)
    packed = inspect_model(model, make_tokenizer(), domains, seq_len=32, packing=True)
    assert any("Sequences of a are short: 4 tokens on average, of at most 32" in note for note in alone.notes)
    assert not packed.notes and packed.settings["packing"] and packed.domains["a"]["sequences"] == 8


def test_no_more_is_read_than_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text(words(100))
    files = (tmp_path / "a.txt", tmp_path / "missing.txt")
    stream = TextStream(Domain("x", files), make_tokenizer(), 30, max_tokens=70)
    assert [len(ids) for ids in stream] == [30, 30, 10] and stream.files == 1


def test_datasets_is_named_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("w3")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install "hf_phibalance\[texts\]"'):
        read(tmp_path / "a.txt")
