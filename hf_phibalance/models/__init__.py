"""
Models: loading them balanced, and those that transformers does not bring.

- [`AutoModelForCausalLM`] and the other auto classes, or transformers' own after [`enable`]: `from_pretrained(..., phi_balance=...)`.
- [`load_any`]: the right one of these for a checkpoint; [`load_tokenizer`]: its tokenizer.
- `checkpoints`: what lies in a checkpoint, in a folder or on the Hub.
- [`register_deepseek_moe`]: a class for the first DeepSeek-MoE.
- [`build_model`] and [`train_tokenizer`]: tiny models from scratch, for the CPU recipes and tests.

This room may know `balancing`, which it patches with, but no trainer and no task.
"""

from ..compat import has_decoder_of_deepseek_moe
from .auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    disable,
    enable,
    load_any,
)
from .checkpoints import base_of, find_adapter, load_tokenizer
from .heads import HEADS, IMAGE_CLASS, TEXT_CLASS, AutoClass, auto_class_name, find_auto_class
from .tiny import build_model, train_tokenizer


__all__ = [
    "HEADS",
    "IMAGE_CLASS",
    "TEXT_CLASS",
    "AutoClass",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "auto_class_name",
    "base_of",
    "build_model",
    "disable",
    "enable",
    "find_adapter",
    "find_auto_class",
    "load_any",
    "load_tokenizer",
    "register_deepseek_moe",
    "train_tokenizer",
]


def register_deepseek_moe() -> None:
    """Makes transformers' auto classes know the model type `"deepseek"`, if it can; see `deepseek_moe.register`."""
    if has_decoder_of_deepseek_moe():
        from .deepseek_moe import register  # imports a modelling file, so only when asked for

        register()
