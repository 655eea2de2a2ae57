"""Where a result comes from: marks that tell one model and one set of prompts from another, and versions."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from ..sidecar import STATE_NAME


PACKAGES = ("torch", "transformers", "hf_phibalance", "evaluate", "datasets")


def model_fingerprint(name_or_path: str, revision: str = "main") -> str:
    """What tells one model from another of the same name: its files with their sizes and times, or its revision."""
    path = Path(name_or_path)
    if not path.is_dir():
        return revision
    kinds = (".safetensors", ".bin", "config.json", STATE_NAME)
    files = sorted(file for file in path.iterdir() if file.name.endswith(kinds))
    return _short_hash("".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n" for file in files))


def text_fingerprint(texts: Iterable[str]) -> str:
    """What tells one list of prompts from another."""
    return _short_hash("\0".join(texts))


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a score depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
