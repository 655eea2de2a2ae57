"""Completions on disk: written batch by batch, found again after an interruption, refused after a change of settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class CompletionStore:
    """
    Completions on disk, as JSON lines: the settings, then one line per batch, then facts about the model.

    A line that a kill has cut off is dropped; a file made with other settings is refused.

    Args:
        path (`Path`): The file.
        settings (`dict`): What the completions depend on.
        overwrite (`bool`, *optional*, defaults to `False`): Start anew.

    Attributes:
        batches (`dict[int, list[dict]]`): Completions by the number of their batch.
        facts (`dict`): What is known besides.
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.batches: dict[int, list[dict[str, Any]]] = {}
        self.facts: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [] if overwrite or not path.exists() else self._complete_lines()
        if not lines:
            path.write_text(json.dumps({"settings": settings}) + "\n")
            return
        found = lines[0].get("settings") if isinstance(lines[0], dict) else None
        if found != settings:
            other = [name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]]
            listed = ", ".join(f"{name}={(found or {}).get(name)!r} (now {settings[name]!r})" for name in other)
            raise ValueError(
                f"{path} holds completions that were made with other settings: {listed or 'unknown ones'}. Use another "
                "output_path, or replace them with --overwrite."
            )
        for line in lines[1:]:
            if "batch" in line:
                self.batches[line["batch"]] = line["completions"]
            else:
                self.facts |= line["facts"]

    def _complete_lines(self) -> list[Any]:
        """What the file holds, after cutting off a last line that was not written to its end."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not a file of completions ({error}). Use another output_path, or replace it with "
                "--overwrite."
            ) from None

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add(self, number: int, completions: list[dict[str, Any]]) -> None:
        """Keeps the completions of a batch."""
        self._write({"batch": number, "completions": completions})
        self.batches[number] = completions

    def add_facts(self, **facts: Any) -> None:
        """Keeps facts by name."""
        self._write({"facts": facts})
        self.facts |= facts

    def completions(self) -> list[dict[str, Any]]:
        """All of them, in the order of the problems."""
        found = [completion for batch in self.batches.values() for completion in batch]
        return sorted(found, key=lambda completion: (completion["index"], completion["sample"]))
