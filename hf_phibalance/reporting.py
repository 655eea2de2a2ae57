"""What every report says alike: layers by short names, versions, the class that loads a model, commands without paths."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any


TEXT_CLASS, IMAGE_CLASS = "AutoModelForCausalLM", "AutoModelForImageTextToText"
PACKAGES_SHOWN = ("hf_phibalance", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def short_layer(layer: str) -> str:
    """`model.layers.3.mlp.gate` as `layer 3`, and other names as they are."""
    parts = layer.split(".")
    numbers = [part for part in parts if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else layer


def layer_labels(names: Sequence[str]) -> list[str]:
    """Short names of layers, `layer 3`, as far as they stay apart."""
    short = [short_layer(name) for name in names]
    seen = Counter(short)
    return [name if seen[label] > 1 else label for name, label in zip(names, short)]


def auto_class_name(model_type: str, architectures: Sequence[str] | None) -> str:
    """
    The auto class for a checkpoint of `model_type`, of which config.json names the `architectures`: that for images and text if it
    was saved as such a model, or if transformers has no causal LM of its type.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    text, images = (
        set((names,) if isinstance(names, str) else names)
        for names in (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ()),
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, ()),
        )
    )
    saved_as = set(architectures or ())
    return IMAGE_CLASS if images and (not text or (images & saved_as and not text & saved_as)) else TEXT_CLASS


def versions() -> dict[str, str]:
    """Versions of the installed packages that a result depends on."""
    found = {}
    for name in PACKAGES_SHOWN:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def without_paths(command: Any) -> str | None:
    """A command line with absolute paths cut to their last part: where files lie on one machine helps nobody else."""
    if not command:
        return None
    if isinstance(command, Sequence) and not isinstance(command, str):
        words = [str(word) for word in command]
    else:
        try:
            words = shlex.split(str(command))
        except ValueError:
            return str(command)
    return shlex.join(Path(word).name if is_absolute(word) else word for word in words)


def is_absolute(value: Any) -> bool:
    """Whether `value` is an absolute path, as text."""
    return isinstance(value, str) and Path(value).is_absolute()
