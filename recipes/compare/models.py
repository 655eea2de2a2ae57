"""
The compared models: four router families with 1.4 million parameters or less.

All parameters except attention and embeddings are in routed experts, so that routing matters.
"""

from __future__ import annotations

from typing import Any

import torch


COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,  # transformers' 0.02 is for far wider models and learns slowly here
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": False,
}
DEEPSEEK = {
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}
# Names are model types of transformers.
MODELS: dict[str, dict[str, Any]] = {
    # softmax over few large experts
    "mixtral": {"head_dim": 32, "intermediate_size": 128, "num_local_experts": 16, "num_experts_per_tok": 2},
    # softmax over many small experts
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 32,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    # sigmoid affinities, a shared expert, a selection bias of its own
    "deepseek_v3": {**DEEPSEEK, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0},
    # softmax, not normalised over the chosen experts, with a shared expert
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy", "norm_topk_prob": False},
}


def build_model(name: str, vocab_size: int, seed: int, **fields: Any):
    """
    Builds a model in fp32 and training mode. The same `seed` gives the same weights. `fields` override those in
    `MODELS`. Raises `ValueError` for a field that the config does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(name)
    unknown = sorted(field for field in fields if field not in MODELS[name] and not hasattr(known, field))
    if unknown:
        raise ValueError(f"the config of {name!r} has no field {unknown[0]!r}; correct `model_fields`.")
    config = AutoConfig.for_model(name, vocab_size=vocab_size, **(COMMON | MODELS[name] | fields))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    return model.train()
