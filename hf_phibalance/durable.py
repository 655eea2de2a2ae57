"""Files that a kill, a full disk or a loss of power leaves whole."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path


NOT_FOR_FOLDERS = {errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP}


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Yields where to write what `path` is to hold. Whatever happens meanwhile, under that name is the whole new file or
    the one that was there before, and after the block it is the new one, also if the power fails.
    """
    partial = path.with_suffix(".partial")
    # a link to something else, in a folder from somewhere else, is not written through
    partial.unlink(missing_ok=True)
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, have reached the disk."""
    try:
        # Windows syncs a file only if it may be written to
        descriptor = os.open(path, os.O_RDWR if path.is_file() and os.access(path, os.W_OK) else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some file systems keep folders without being told, and refuse to be told
        if not (path.is_dir() and error.errno in NOT_FOR_FOLDERS):
            raise


def flush_tree(folder: Path) -> None:
    """Waits until everything in `folder`, and its own name, have reached the disk; others may be at work in it."""
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent, name) for name in files), Path(parent)):
            with contextlib.suppress(FileNotFoundError):
                flush(path)
    if folder.is_dir():
        flush(folder.parent)
