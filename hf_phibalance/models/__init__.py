"""
Models: loading them balanced, and those that transformers does not bring.

- [`AutoModelForCausalLM`], [`AutoModelForImageTextToText`], or transformers' own auto classes after [`enable`]: `from_pretrained(..., phi_balance=...)`.
- [`load_any`]: the right one of these for a checkpoint; [`base_of_adapter`]: what an adapter is one of.
- [`register_deepseek_moe`]: a class for the first DeepSeek-MoE.
- [`build_model`] and [`train_tokenizer`]: tiny models from scratch, for the CPU recipes and tests.

This room may know `balancing`, which it patches with, but no trainer and no task.
"""

from ..compat import has_decoder_of_deepseek_moe
from .auto import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    auto_class_for,
    base_of_adapter,
    disable,
    enable,
    find_state,
    load_any,
)
from .tiny import build_model, train_tokenizer


__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "auto_class_for",
    "base_of_adapter",
    "build_model",
    "disable",
    "enable",
    "find_state",
    "load_any",
    "register_deepseek_moe",
    "train_tokenizer",
]


def register_deepseek_moe() -> None:
    """Makes transformers' auto classes know the model type `"deepseek"`, if it can; see `deepseek_moe.register`."""
    if has_decoder_of_deepseek_moe():
        from .deepseek_moe import register  # imports a modelling file, so only when asked for

        register()
