"""Finds what lies in a checkpoint, a folder or a name on the Hub: an adapter and its base model, a tokenizer."""

from __future__ import annotations

import os
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..files import find_file, hub_arguments, quoted, read_json
from .heads import HEADS, AutoClass


def load_tokenizer(source: str | os.PathLike, name: str | os.PathLike | None, kwargs: dict[str, Any]) -> Any:
    """
    Loads the tokenizer of a checkpoint. An adapter without one has that of its base model.

    Args:
        source (`str` or `os.PathLike`): the checkpoint.
        name (`str` or `os.PathLike`, *optional*): another folder or name to take the tokenizer from.
        kwargs (`dict`): arguments that `source` is loaded with.

    Raises:
        ValueError: if there is no tokenizer, or one without tokens.
    """
    code = {"trust_remote_code": kwargs.get("trust_remote_code")}
    if name is not None:
        source, kwargs = name, {key: kwargs[key] for key in kwargs if key not in ("revision", "subfolder")}
    adapter = find_adapter(source, kwargs)
    if adapter is not None and find_file(source, "tokenizer_config.json", kwargs) is None:
        source, kwargs = base_of(adapter, source, kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_arguments(kwargs), **code)
    except (ValueError, OSError, KeyError) as error:
        is_damaged = not os.path.isdir(source) or find_file(source, "tokenizer_config.json", kwargs) is not None
        reason = f" ({str(error).strip().splitlines()[0]})" if is_damaged else ""
        raise ValueError(f"no tokenizer in {source}{reason}, use --tokenizer") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # some classes are made of nothing where there are no files
        raise ValueError(f"no tokenizer in {source}, use --tokenizer")
    return tokenizer


# ---------------------------------------------------------------------- adapters


def find_adapter(source: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """
    Returns what the `adapter_config.json` in `source` says; `None` if that is no adapter.

    Raises:
        ValueError: if it is damaged, or names no base model.
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
    Returns the base model of `adapter`, which is in `source`, and `kwargs` as they are for it.

    Raises:
        ValueError: if that is an adapter, too.
    """
    base = adapter["base_model_name_or_path"]
    kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    if adapter.get("revision"):
        kwargs["revision"] = adapter["revision"]
    if find_adapter(base, kwargs) is not None:
        raise ValueError(
            f"{base}, the base model of the adapter in {source}, is an adapter itself, or has one in its folder. Merge that one "
            "(PeftModel.merge_and_unload) and save the result; keep a model and an adapter in different folders."
        )
    return base, kwargs


def auto_class_of(adapter: dict[str, Any]) -> AutoClass | None:
    """Returns the auto class for the task of `adapter`; `None` if the class of its base model decides."""
    task = adapter.get("task_type")
    return None if task == "CAUSAL_LM" else next((name for name, (_, own) in HEADS.items() if own == task), None)


def class_below(adapter: dict[str, Any]) -> list[str] | None:
    """Returns the name of the class that `adapter` was trained on, if the adapter says it: without a task it does."""
    mapping = adapter.get("auto_mapping")
    return [str(mapping["base_model_class"])] if isinstance(mapping, dict) and "base_model_class" in mapping else None


def labels_of(source: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, int]:
    """Returns `num_labels` of a classifier's head in the adapter in `source`: the base model may have no head, or another."""
    path = find_file(source, ADAPTER_SAFE_WEIGHTS_NAME, kwargs)
    if path is None:
        return {}
    with safe_open(path, "pt") as file:
        names: list[str] = file.keys()
        heads = [name for name in names if name.endswith((".model.score.weight", ".model.classifier.weight"))]
        return {"num_labels": file.get_slice(heads[0]).get_shape()[0]} if heads else {}
