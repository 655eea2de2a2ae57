"""
Models: loads them with balancing, and builds those that transformers lacks. Knows `balancing`, not trainers or tasks.

| module | contents |
|---|---|
| `auto` | `AutoModelForCausalLM` and the other auto classes, `from_pretrained(..., phi_balance=...)` |
| `checkpoints` | what a checkpoint contains: head, adapter, tokenizer |
| `deepseek_moe` | a class for the first DeepSeek-MoE |
| `tiny` | tiny models from scratch, for the CPU recipes and tests |
| `upcycling` | `upcycle`: a MoE model made of a dense one |
"""
# ruff: noqa: F401

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
    register_deepseek_moe,
)
from .checkpoints import (
    HEADS,
    IMAGE_CLASS,
    TEXT_CLASS,
    AutoClass,
    auto_class_name,
    base_of,
    check_whole,
    find_adapter,
    find_auto_class,
    load_tokenizer,
    open_weights,
)
from .tiny import build_model, train_tokenizer
from .upcycling import Difference, Upcycler, Upcycling, difference, made_logits, upcycle
