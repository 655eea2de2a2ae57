"""Sequences of token ids as batches that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def padded_batches(sequences: Sequence[Sequence[int]], batch_size: int, pad: int) -> list[dict[str, Any]]:
    """Right-padded batches with attention mask and labels, of `batch_size` rows."""
    batches = []
    for start in range(0, len(sequences), batch_size):
        part = [torch.tensor(row) for row in sequences[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=pad)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in part])[:, None]
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)})
    return batches


def padding_of(tokenizer: Any) -> int:
    """A token to pad with; the mask hides it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
