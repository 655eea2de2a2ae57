"""What every cell trains, the same in every process: a tiny model, and 16 rows dealt to micro-batches."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


COEF = 5.0  # large, so that g - g_0 is no difference of nearly equal numbers
AUX_COEF = 5.0

ROWS, LONGEST, PAD, VOCAB = 16, 48, 0, 96
FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}


def build_model(model_type: str, built_in: bool = False) -> nn.Module:
    """A tiny model from scratch; with `built_in` its own auxiliary loss is on."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(model_type)
    fields = {name: value for name, value in FIELDS.items() if hasattr(known, name)}
    config = AutoConfig.for_model(model_type, **fields)
    if built_in:
        config.output_router_logits, config.router_aux_loss_coef = True, AUX_COEF
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # a wider spread than a fresh model has, so that routing is not nearly tied
                nn.init.normal_(parameter, std=0.15)
        with torch.no_grad():  # tokens have something in common, so that the routers are out of balance
            embedding = model.get_input_embeddings().weight
            embedding += torch.randn(embedding.shape[-1])
    return model.train()


def build_rows() -> list[dict[str, list[int]]]:
    """Prompt and completion of each row as token ids; the loss is on the completion alone."""
    rng = random.Random(0)
    rows = []
    for _ in range(ROWS):
        ids = [rng.randrange(3, VOCAB) for _ in range(rng.randint(4, LONGEST))]
        prompt = rng.randrange(1, len(ids) - 1)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def deal(parts: int) -> list[list[int]]:
    """The indices of all rows in `parts` micro-batches of unequal size, none of them empty."""
    rng = random.Random(parts)
    order = rng.sample(range(ROWS), ROWS)
    batches = [[row] for row in order[:parts]]
    for row in order[parts:]:
        batches[int(parts * rng.random() ** 2)].append(row)  # the first ones get most
    return batches


def collate(rows: Sequence[dict[str, list[int]]], length: int | None = None) -> dict[str, Tensor]:
    """Pads on the right, to the longest of `rows` unless a `length` is given."""
    length = length or max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])

    ids = pad("input_ids", PAD)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": pad("labels", -100)}


def padded_length(token_mask: str) -> int | None:
    """Where padding counts as well, there has to be equally much of it in every split."""
    return LONGEST if token_mask == "all" else None


@functools.cache
def build_tokenizer() -> Any:
    """What `SFTTrainer` wants to see; the rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *map(str, range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
