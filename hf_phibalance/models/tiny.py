"""Builds tiny models with random weights from any `transformers` config, and trains tokenizers for them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def train_tokenizer(texts: Iterable[str], vocab_size: int = 640, max_length: int = 1024) -> Any:
    """
    Trains a byte-level BPE tokenizer. Every digit is a token of its own. Any text survives encoding and decoding.

    Args:
        texts (`Iterable[str]`): Training texts.
        vocab_size (`int`, *optional*, defaults to 640): Includes 256 bytes and the special tokens `<pad>` and `</s>`.
        max_length (`int`, *optional*, defaults to 1024): `model_max_length` of the tokenizer.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: The tokenizer. It pads on the left, for generation.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def build_model(model_type: str, fields: dict[str, Any], tokenizer: Any) -> Any:
    """
    Builds a causal language model with random weights.

    Args:
        model_type (`str`): Any `model_type` of `transformers`, for example `"mixtral"`.
        fields (`dict[str, Any]`): Fields of its config (`hidden_size`, `num_hidden_layers`, ...).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Gives the vocabulary size and the special tokens.

    Raises:
        ValueError: If the model type or a field is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(f"model_type={model_type!r} is unknown to transformers: use one such as 'mixtral'") from error
    own = ("attn_implementation", "experts_implementation")
    if unknown := sorted(key for key in fields if not hasattr(known, key) and key not in own):
        raise ValueError(f"model_config has {unknown}, which {type(known).__name__} lacks: correct or remove them")
    config = AutoConfig.for_model(
        model_type,
        **{key: value for key, value in fields.items() if key not in own},
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config, **{key: fields[key] for key in own if key in fields})
