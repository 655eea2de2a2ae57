"""Finds the PEFT adapter that is switched on: a selection bias belongs to the adapter that it was trained with."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import nn

from .process import follow_peft


def find_layer(
    root: nn.Module, known: weakref.ref[nn.Module] | None = None, is_new: bool = False
) -> weakref.ref[nn.Module] | None:
    """
    Returns a PEFT layer in `root`, for [`active`]; `None` if there is none.

    Args:
        root (`torch.nn.Module`): the transformers model.
        known (`weakref.ref`, *optional*): what the last call returned.
        is_new (`bool`, *optional*, defaults to `False`): whether to search even if `root` has no `peft_config`, like the
            backbone of a copy.
    """
    if known is not None and known() is not None:
        return known
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not (is_new or hasattr(root, "peft_config")):
        return None
    follow_peft()  # PEFT may have been imported since
    found = (module for module in root.modules() if isinstance(module, tuners.BaseTunerLayer))
    return next((weakref.ref(layer) for layer in found), None)


def active(layer: weakref.ref[nn.Module] | None, even_disabled: bool = False) -> str | None:
    """Returns the adapter that is switched on in `layer` (of [`find_layer`]); `None` if there is none, or if it is disabled."""
    found: Any = None if layer is None else layer()
    if found is None or (found.disable_adapters and not even_disabled):
        return None
    return next(iter(found.active_adapters), None)


def virtual_tokens(model: nn.Module) -> int | None:
    """Returns how many tokens PEFT's prompt learning puts in front of each row of `model`; `None` without prompt learning."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    if config is None or not getattr(config, "is_prompt_learning", False):
        return None
    return 0 if str(config.peft_type).endswith("PREFIX_TUNING") else int(config.num_virtual_tokens)


def refuse_virtual_tokens(model: nn.Module) -> None:
    """
    Refuses prompt learning where the base model is run alone.

    Raises:
        ValueError: with the remedy.
    """
    if virtual_tokens(model) is not None:
        raise ValueError(
            f"the adapter of {type(model).__name__} puts virtual tokens in front of every row, which this would leave out. Call it "
            "on the base model (model.get_base_model()), or train another kind of adapter, e.g. phb.lora_config(model)."
        )
