"""Reads what a checkpoint (folder or Hub) contains: the model's head, an adapter and its base model, a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import transformers
from safetensors import SafetensorError, safe_open
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..files import find_file, hub_arguments, quoted, read_json


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
HEADS: dict[AutoClass, tuple[str, str]] = {  # name of the task on the Hub, and in PEFT
    TEXT_CLASS: ("text-generation", "CAUSAL_LM"),
    IMAGE_CLASS: ("image-text-to-text", "CAUSAL_LM"),
    "AutoModelForSequenceClassification": ("text-classification", "SEQ_CLS"),
    "AutoModelForTokenClassification": ("token-classification", "TOKEN_CLS"),
    "AutoModelForQuestionAnswering": ("question-answering", "QUESTION_ANS"),
    "AutoModel": ("feature-extraction", "FEATURE_EXTRACTION"),
}


def auto_class_name(model_type: str, architectures: Sequence[str] | None) -> AutoClass:
    """
    Returns the auto class of transformers that loads a model with its head.

    Args:
        model_type (`str`): Model type in its config.
        architectures (`Sequence[str]`, *optional*): Class names, from config.json or from the class and its parents.

    Raises:
        ValueError: If transformers has no auto class for this class.
    """
    found = find_auto_class(model_type, architectures)
    if found is None:
        raise ValueError(
            f"{', '.join(architectures or ())[:200]} of model_type={model_type!r} is loaded by none of {', '.join(HEADS)}, so its "
            "head would be lost. Load it with its own class, then call phb.patch(model)."
        )
    return found


def find_auto_class(model_type: str, architectures: Sequence[str] | None) -> AutoClass | None:
    """Like [`auto_class_name`], but returns `None` instead of raising."""
    saved_as, known = tuple(architectures or ()), {}
    for name in HEADS:
        classes = getattr(transformers, name)._model_mapping._model_mapping.get(model_type, ())
        known[name] = {classes} if isinstance(classes, str) else set(classes)
        if not known[name].isdisjoint(saved_as):
            return name
    if not saved_as:
        return IMAGE_CLASS if known[IMAGE_CLASS] and not known[TEXT_CLASS] else TEXT_CLASS
    endings = {name.removeprefix("AutoModelFor"): name for name in HEADS}  # for remote code
    default = None if any(known.values()) else TEXT_CLASS
    return next((name for ending, name in endings.items() for cls in saved_as if cls.endswith(ending)), default)


def load_tokenizer(source: str | os.PathLike, name: str | os.PathLike | None, kwargs: dict[str, Any]) -> Any:
    """
    Loads the tokenizer of a checkpoint. An adapter without a tokenizer gets that of its base model.

    Args:
        source (`str` or `os.PathLike`): The checkpoint.
        name (`str` or `os.PathLike`, *optional*): Folder or Hub name of the tokenizer, if it is not in `source`.
        kwargs (`dict`): Arguments that `source` is loaded with.

    Raises:
        ValueError: If there is no tokenizer, or it has no tokens.
    """
    code = {"trust_remote_code": kwargs.get("trust_remote_code")}
    if name is not None:
        source, kwargs = name, _without_revision(kwargs)
    adapter = find_adapter(source, kwargs)
    if adapter is not None and find_file(source, "tokenizer_config.json", kwargs) is None:
        source, kwargs = base_of(adapter, source, kwargs)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **hub_arguments(kwargs), **code)
    except (ValueError, OSError, KeyError) as error:
        is_damaged = not os.path.isdir(source) or find_file(source, "tokenizer_config.json", kwargs) is not None
        reason = f" ({str(error).strip().splitlines()[0]})" if is_damaged else ""
        raise ValueError(f"no tokenizer in {source}{reason}, use --tokenizer") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers builds some tokenizers without any file
        raise ValueError(f"no tokenizer in {source}, use --tokenizer")
    return tokenizer


@contextmanager
def open_weights(path: str | os.PathLike) -> Iterator[Any]:
    """Context manager: opens a safetensors file. Raises `ValueError` if it is damaged: cut off, or a pointer of git-lfs."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}). Download it again.") from error


def check_whole(info: Mapping[str, Any], source: str) -> None:
    """Raises `ValueError` if transformers' loading info names weights of `source` that it made up."""
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise ValueError(
            f"{wrong[0]!r} in {source} is missing or has another shape than config.json says. Is it a model "
            "with that head? Then download it again."
        )


# ---------------------------------------------------------------------- adapters


def find_adapter(source: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """
    Returns the contents of `adapter_config.json` in `source`, or `None` if `source` is not an adapter.

    Raises:
        ValueError: If the file is damaged or names no base model.
    """
    path = find_file(source, "adapter_config.json", kwargs)
    if path is None:
        return None
    remedy = "Save the adapter again with PEFT's save_pretrained."
    values = read_json(path, remedy)
    base = values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"base_model_name_or_path in {path} must be the name of a model, got {quoted(base)}. {remedy}"
        )
    return values


def base_of(adapter: dict[str, Any], source: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """
    Returns the base model of the `adapter` in `source`, and `kwargs` changed to load the base model.

    Raises:
        ValueError: If the base model is an adapter too, or a path where there is nothing.
    """
    base = adapter["base_model_name_or_path"]
    is_path = os.path.isabs(base) or base.startswith(".") or base.count("/") > 1  # no name on the Hub is like that
    if is_path and not os.path.exists(base):
        raise ValueError(
            f"base_model_name_or_path in {source}/adapter_config.json is {quoted(base)}, and there is nothing: the base model was moved, or "
            "the path was relative to another folder. Correct it there."
        )
    kwargs = _without_revision(kwargs)
    if adapter.get("revision"):
        kwargs["revision"] = adapter["revision"]
    if find_adapter(base, kwargs) is not None:
        raise ValueError(
            f"{base}, the base model of the adapter in {source}, is an adapter itself, or has one in its folder. Merge that one "
            "(PeftModel.merge_and_unload) and save the result; keep a model and an adapter in different folders."
        )
    return base, kwargs


def _without_revision(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}


def auto_class_of(adapter: dict[str, Any]) -> AutoClass | None:
    """Returns the auto class for the task of `adapter`, or `None` if the class of its base model decides."""
    task = adapter.get("task_type")
    return None if task == "CAUSAL_LM" else next((name for name, (_, own) in HEADS.items() if own == task), None)


def class_below(adapter: dict[str, Any]) -> list[str] | None:
    """Returns the model class that `adapter` was trained on, if it names one. Only adapters without a task do."""
    mapping = adapter.get("auto_mapping")
    return [str(mapping["base_model_class"])] if isinstance(mapping, dict) and "base_model_class" in mapping else None


def labels_of(source: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, int]:
    """Returns `num_labels` of the classifier in adapter `source`, or `{}`. The base model may have another head."""
    path = find_file(source, ADAPTER_SAFE_WEIGHTS_NAME, kwargs)
    if path is None:
        return {}
    with open_weights(path) as file:
        names: list[str] = file.keys()
        heads = [name for name in names if name.endswith((".model.score.weight", ".model.classifier.weight"))]
        return {"num_labels": file.get_slice(heads[0]).get_shape()[0]} if heads else {}
