"""A disk that gets full."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


class Disk:
    """A small file system in memory where it may be mounted; else a limit to the size of files stands in for it."""

    def __init__(self) -> None:
        self.refusal = ""
        with (
            tempfile.TemporaryDirectory() as name,
            contextlib.suppress(PermissionError),
            self._mounted(Path(name), 2**20),
        ):
            return
        self.refusal = self.refusal or "mounting is not permitted"

    @contextlib.contextmanager
    def _mounted(self, folder: Path, size: int) -> Iterator[Path]:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.refusal = str(getattr(error, "stderr", None) or error).strip()
            raise PermissionError(self.refusal) from error
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)

    @contextlib.contextmanager
    def under(self, home: Path, moment: str, size: int) -> Iterator[Path]:
        """Where a run writes: a disk of `size` bytes for the moment `"disk"`, and `home` for others."""
        if moment != "disk" or self.refusal:
            yield home
            return
        (home / "disk").mkdir()
        with self._mounted(home / "disk", size) as place:
            yield place

    @contextlib.contextmanager
    def filled_up_to(self, place: Path, room: int) -> Iterator[None]:
        """Leaves `room` bytes on the disk meanwhile."""
        if self.refusal:
            yield
            return
        ballast, free = place / "ballast", os.statvfs(place)
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - room, 1))
        try:
            yield
        finally:
            ballast.unlink()
