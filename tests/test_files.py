"""Files: untrusted JSON gives a `ValueError` that names the file, and files are replaced whole and reach the disk."""

import errno
import json
import os
import tracemalloc

import pytest
from hostile import CALM, damaged, json_values
from hypothesis import given
from hypothesis import strategies as st

from hf_phibalance import PhiBalanceConfig
from hf_phibalance.config import CONFIG_NAME
from hf_phibalance.files import SMALL, flush, flush_tree, parse_json, printable, quoted, read_json, replacing


BAD = {
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 200_000,
    "closed deep lists": b"[" * 200_000 + b"]" * 200_000,
    "a key twice": b'{"coef": 0.1, "coef": 100}',
    "a key twice, inside": b'{"potential_kwargs": {"alpha": 1, "alpha": 2}}',
    "latin-1": '{"potential": "é"}'.encode("latin-1"),
    "utf-16": '{"coef": 0.1}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"coef": 0.1}',
    "a number without end": b'{"coef": ' + b"1" * 5000 + b"}",
    "half a character": b'{"potential": "\\ud800"}',
    "more than one": b"{}{}",
    "nothing": b"",
    "zeros": b"\0" * 100,
    "python": b"{'coef': 0.1}",
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_what_is_no_json(content, tmp_path):
    with pytest.raises(ValueError):
        parse_json(content)
    (tmp_path / CONFIG_NAME).write_bytes(content)
    with pytest.raises(
        ValueError, match=r"phi_balance\.json is not valid JSON.*Write it again with PhiBalanceConfig.save"
    ):
        PhiBalanceConfig.load(tmp_path)


@CALM
@given(values=json_values)
def test_json_is_read_as_ever(values):
    text = json.dumps(values)
    assert json.dumps(parse_json(text)) == json.dumps(parse_json(text.encode())) == text


@pytest.mark.parametrize("size", [SMALL + 1, 10 * 2**30])
def test_what_is_too_large_is_not_read(size, tmp_path):
    path = tmp_path / CONFIG_NAME
    path.write_bytes(b"{}")
    os.truncate(path, size)  # without blocks on the disk
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"phi_balance\.json has more than 1,048,576 bytes"):
        PhiBalanceConfig.load(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * SMALL
    tracemalloc.stop()


def test_links_and_pipes(tmp_path):
    (tmp_path / "elsewhere").write_text('{"coef": 0.25}')
    link = tmp_path / CONFIG_NAME
    link.symlink_to("elsewhere")
    assert PhiBalanceConfig.load(tmp_path).coef == 0.25
    os.mkfifo(tmp_path / "pipe")
    for target, error in (
        ("pipe", ValueError),
        ("/dev/zero", ValueError),
        (CONFIG_NAME, OSError),
        ("nowhere", OSError),
    ):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(error, match=r"phi_balance\.json"):
            PhiBalanceConfig.load(link)
    with pytest.raises(ValueError, match=r"is no file\. Give another\."):
        read_json(tmp_path, "Give another.")


@CALM
@given(
    values=st.dictionaries(
        st.one_of(st.sampled_from([*PhiBalanceConfig.__dataclass_fields__, "version"]), st.text(max_size=8)),
        json_values,
        max_size=4,
    )
)
def test_any_fields_of_a_config(values, tmp_path_factory):
    """Refused, naming the file; or of values with which it makes the round trip."""
    folder = tmp_path_factory.getbasetemp()
    (folder / CONFIG_NAME).write_text(json.dumps(values))
    try:
        config = PhiBalanceConfig.load(folder)
    except ValueError as error:
        assert CONFIG_NAME in str(error)
    else:
        assert all(getattr(config, name) == value for name, value in values.items() if name != "version")
        assert PhiBalanceConfig.load(config.save(folder)) == config


@CALM
@given(data=st.data())
def test_any_damage_to_a_config(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    path = PhiBalanceConfig(potential="tsallis", potential_kwargs={"alpha": 1.5}, coef=0.5).save(folder)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    try:
        config = PhiBalanceConfig.load(folder)
    except ValueError as error:
        assert CONFIG_NAME in str(error)
    else:
        assert PhiBalanceConfig.from_dict(config.to_dict()) == config


def test_values_in_messages_are_short_and_printable():
    for value in ("", "é'", "x" * 190, 3, 10**40, 1e300, None, [1, ["a"]], {"a": {"b": True}}, (float("nan"),)):
        assert quoted(value) == repr(value)
    deep = "x"
    for _ in range(100_000):
        deep = [deep]
    for value in ("x" * 10**6, {"k" * 999: ["v" * 999] * 999}, 10**4000, deep, "\n\x1b[31m\ud800", b"\xff" * 999):
        assert 10 < len(quoted(value)) <= 200 and quoted(value).isprintable()
    assert quoted("x" * 300).startswith("'xxx") and "..." in quoted("x" * 300)
    assert printable("caf\udce9 \x1b[1m\n é φ") == r"caf\udce9 \x1b[1m\n é φ"


# ---------------------------------------------------------------------- writing


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "kept.json"
    for content in ("first", "second"):
        with replacing(path) as partial:
            partial.write_text(content)
    with pytest.raises(OSError, match="disk full"), replacing(path) as partial:
        partial.write_text("half of the thi")
        raise OSError("disk full")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"kept.json": "second"}


@pytest.fixture
def flushed(monkeypatch):
    """The files that were flushed, in order, by inode."""
    inodes, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (inodes.append(os.fstat(descriptor).st_ino), fsync(descriptor))
    )
    return inodes


def test_content_is_on_the_disk_before_its_name_is(tmp_path, flushed, monkeypatch):
    path = tmp_path / "file"
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (flushed.append("replaced"), replace(*paths)))
    with replacing(path) as partial:
        partial.write_text("content")
    assert flushed == [path.stat().st_ino, "replaced", tmp_path.stat().st_ino]


def test_tree_is_flushed_with_its_folders(tmp_path, flushed):
    inner = tmp_path / "checkpoint" / "shards"
    inner.mkdir(parents=True)
    files = [tmp_path / "checkpoint" / "model", inner / "shard"]
    for file in files:
        file.write_text("content")
    flush_tree(tmp_path / "checkpoint")
    assert set(flushed) == {path.stat().st_ino for path in [*files, inner, inner.parent, tmp_path]}
    flush_tree(tmp_path / "of another node")


def test_folder_that_cannot_be_flushed_is_no_error(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    flush(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "file")
