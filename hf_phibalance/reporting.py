"""What reports share: short names of layers, versions, auto classes, commands without paths, and output that cannot fail."""

from __future__ import annotations

import importlib.metadata
import io
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal


AutoClass = Literal[
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModel",
]
TEXT_CLASS: AutoClass = "AutoModelForCausalLM"
IMAGE_CLASS: AutoClass = "AutoModelForImageTextToText"
HEADS: dict[AutoClass, tuple[str, str]] = {  # the task of a model on the Hub, and in PEFT
    TEXT_CLASS: ("text-generation", "CAUSAL_LM"),
    IMAGE_CLASS: ("image-text-to-text", "CAUSAL_LM"),
    "AutoModelForSequenceClassification": ("text-classification", "SEQ_CLS"),
    "AutoModelForTokenClassification": ("token-classification", "TOKEN_CLS"),
    "AutoModelForQuestionAnswering": ("question-answering", "QUESTION_ANS"),
    "AutoModel": ("feature-extraction", "FEATURE_EXTRACTION"),
}
PACKAGES_SHOWN = ("hf_phibalance", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def replace_unprintable() -> None:
    """Makes stdout and stderr replace what their encoding lacks (code page 1252 of Windows has no φ) instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has streams of its own
            stream.reconfigure(errors="replace")


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


def auto_class_name(model_type: str, architectures: Sequence[str] | None) -> AutoClass:
    """
    Returns the auto class of transformers that loads a model with its head.

    Args:
        model_type (`str`): of its config.
        architectures (`Sequence[str]`, *optional*): names of its class: of config.json, or of the class and its parents.

    Raises:
        ValueError: if transformers has no auto class for this class.
    """
    found = find_auto_class(model_type, architectures)
    if found is None:
        raise ValueError(
            f"{', '.join(architectures or ())[:200]} of model_type={model_type!r} is loaded by none of {', '.join(HEADS)}, so its "
            "head would be lost. Load it with its own class, then call phb.patch(model)."
        )
    return found


def find_auto_class(model_type: str, architectures: Sequence[str] | None) -> AutoClass | None:
    """Returns what [`auto_class_name`] returns, or `None` where it raises."""
    from transformers.models.auto import modeling_auto as auto

    registries: Any = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    saved_as, known = tuple(architectures or ()), {}
    for name, registry in zip(HEADS, registries):
        classes = registry.get(model_type, ())
        known[name] = {classes} if isinstance(classes, str) else set(classes)
        if not known[name].isdisjoint(saved_as):
            return name
    if not saved_as:
        return IMAGE_CLASS if known[IMAGE_CLASS] and not known[TEXT_CLASS] else TEXT_CLASS
    ending = {name.removeprefix("AutoModelFor"): name for name in HEADS}  # of remote code
    default = None if any(known.values()) else TEXT_CLASS
    return next((ending[head] for head in ending for cls in saved_as if cls.endswith(head)), default)


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


def hub_name(name: str | None) -> str | None:
    """Returns `name` if it can be a repository on the Hub, and `None` for a folder, here or on another machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and "/" in name and not Path(name).exists() else None


def public_name(name: str) -> str:
    """Returns the name of a model or dataset; of a folder the last part, since the path is private."""
    return hub_name(name) or re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def is_absolute(value: Any) -> bool:
    """Whether `value` is an absolute path, as text."""
    return isinstance(value, str) and Path(value).is_absolute()
