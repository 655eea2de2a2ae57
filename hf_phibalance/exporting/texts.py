"""Texts in two parts: what a fold is fitted on, and what all variants are measured on, which is never the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..inspection import Domain, TextStream


MEASURED = 3  # every so many documents, one is measured on
FEW = 6  # documents: with fewer, the last sequences of each are measured on


def split_texts(
    domains: Sequence[Domain], tokenizer: Any, seq_len: int, max_tokens: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """
    Sequences of token ids to fit on and to measure on, of every domain the same share.

    Args:
        domains (`Sequence[Domain]`): as [`parse_domains`] makes them.
        tokenizer: of the model.
        seq_len (`int`): longest sequence.
        max_tokens (`int`, *optional*): tokens that are read of each domain.

    Raises:
        ValueError: if there is too little text to be split.
    """
    fitted: list[list[int]] = []
    measured: list[list[int]] = []
    for domain in domains:
        stream = TextStream(domain, tokenizer, seq_len, max_tokens)
        numbered = [(stream.documents, ids) for ids in stream]
        if stream.documents >= FEW:
            fitted += [ids for number, ids in numbered if number % MEASURED]
            measured += [ids for number, ids in numbered if not number % MEASURED]
        else:
            cut = len(numbered) - len(numbered) // MEASURED
            fitted += [ids for _, ids in numbered[:cut]]
            measured += [ids for _, ids in numbered[cut:]]
    if not fitted or not measured:
        raise ValueError(
            f"`--texts` hold {len(fitted) + len(measured)} sequence(s), too few to fit on some and measure on others: give more "
            "text, or shorter sequences (`--seq_len`)."
        )
    return fitted, measured
