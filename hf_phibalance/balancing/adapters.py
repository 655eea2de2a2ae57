"""A selection bias and PEFT's adapters: a bias belongs to the adapter it was trained with, as its weights do."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import nn

from .process import follow_peft


def active(root: nn.Module, known: weakref.ref[nn.Module] | None) -> tuple[str | None, weakref.ref[nn.Module] | None]:
    """
    The adapter that is switched on in `root`; `None` if there is none, or if it is disabled.

    Args:
        root (`torch.nn.Module`): the transformers model.
        known (`weakref.ref`, *optional*): to a layer of PEFT in it, as returned by the last call.
    """
    layer: Any = None if known is None else known()
    if layer is None:
        tuners = sys.modules.get("peft.tuners.tuners_utils")
        if tuners is None or not hasattr(root, "peft_config"):
            return None, None
        layer = next((module for module in root.modules() if isinstance(module, tuners.BaseTunerLayer)), None)
        if layer is None:
            return None, None
        follow_peft()  # which may have been imported since
    names = () if layer.disable_adapters else layer.active_adapters
    return (names[0] if names else None), weakref.ref(layer)


def virtual_tokens(model: nn.Module) -> int:
    """Tokens that prompt learning of PEFT (prompt tuning, P-tuning) puts in front of each row of `model`; 0 without it."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    if config is None or not getattr(config, "is_prompt_learning", False):
        return 0
    return 0 if str(config.peft_type).endswith("PREFIX_TUNING") else int(config.num_virtual_tokens)
