"""A run that may take longer than a sitting: what it needs to go on is kept every few minutes, and taken up bit-identically."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_phibalance.files import replacing


EVERY = 300.0  # seconds; shorter runs are simply done again


class Unfinished:
    """
    Args:
        path (`pathlib.Path`): File of the run, there only while the run is not finished.
        every (`float`, *optional*, defaults to 300): Seconds between two writings.
    """

    def __init__(self, path: Path, every: float = EVERY) -> None:
        self.path, self.every = path, every
        self._kept = time.monotonic()

    def take_up(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Puts the states of `parts` (all that have a `state_dict`) back, and returns the notes; empty if there are none."""
        if not self.path.is_file():
            return {}
        kept = torch.load(self.path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(kept["parts"][name])
        return kept["notes"]

    def keep(self, parts: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Writes the states of `parts` and the notes, if it is time."""
        if time.monotonic() - self._kept < self.every:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        states = {name: part.state_dict() for name, part in parts.items()}
        with replacing(self.path) as partial:
            torch.save({"parts": states, "notes": dict(notes)}, partial)
        self._kept = time.monotonic()

    def remove(self) -> None:
        """The run is finished."""
        self.path.unlink(missing_ok=True)
