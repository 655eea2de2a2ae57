"""What is written is whole, and has reached the disk, or what was there before is still there."""

import errno
import os

import pytest

from hf_phibalance.files import flush, flush_tree, replacing


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
