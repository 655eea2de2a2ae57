"""Tiny random causal-LM MoE models, one for every model type of transformers that has routers.

A model has three layers (at least two of them MoE), hidden size 32, 8 experts of which 2 are used, and a vocabulary of
128. Every weight is random and the routers get a larger spread, so that routing is neither tied nor collapsed.
"""

import dataclasses
import inspect
import re
from itertools import chain
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_phibalance as phb


def _has_routers(model_type: str) -> bool:
    """True if the modelling file declares the recorder or (before 5.20) chooses experts. Saves 60 imports."""
    name = model_type_to_module_name(model_type)
    path = Path(transformers.__file__).parent / "models" / name / f"modeling_{name}.py"
    if not path.is_file():  # a type that uses another's model class
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], None)
        path = Path(inspect.getfile(model_class)) if model_class else path
    source = path.read_text() if path.is_file() else ""
    return '"router_logits":' in source or (
        "topk(" in source and re.search(r"self\.(gate|router) = ", source) is not None
    )


MODEL_TYPES: list[str] = sorted(filter(_has_routers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

ROUTER = re.compile(r"\.(gate|router|router_gate)\.")  # in the names of router parameters
FIRST_PLAIN_ID = 3  # pad, bos and eos are below; other special ids of composite models are beyond the tiny vocabulary

# Model types that cannot be built or run tiny, with the reason.
UNBUILDABLE: dict[str, str] = {}

# Applied to each config that has the field.
SHRINK = {
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # linear attention and state-space layers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    # which layers are MoE
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_only_layers": [0],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}

HYBRID_LAYERS = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
GROUPS = {"n_group": 4, "topk_group": 2}

# Differences by model type (for a composite model type: besides `text_config`).
OVERRIDES: dict[str, dict] = {
    "axk1": GROUPS,
    "bailing_hybrid": HYBRID_LAYERS | {"num_expert_group": 4, "topk_group": 2},
    "beam": GROUPS,
    "dbrx": {
        # the attention reads `rope_theta`, which the config does not declare, and cannot do without clipping
        "attn_config": {"kv_n_heads": 4, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_v3": GROUPS,
    "deepseek_v32": GROUPS,
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "head_dim": 16,
        "num_key_value_heads": 1,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "doge": {"is_moe": True, "num_experts": 16},  # product keys: the number of experts is a square
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"vision_config": {"adapter_out_dim": 32}, "audio_config": {"adapter_out_dim": 32}},
    "dots3_note_text": {"head_dim": 16, "per_layer_config": {}},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    },
    "inkling_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8, "rel_extent": 16},
    "inkling2_text": {
        "unpadded_vocab_size": 128,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 8,
        "rel_extent": 16,
    },
    "inkling2_loop_text": {
        "unpadded_vocab_size": 128,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 8,
        "rel_extent": 16,
    },
    "jamba": {
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": HYBRID_LAYERS,
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"]},
    "longcat_flash": {
        "num_layers": 2,  # each has two attention blocks
        "ffn_hidden_size": 32,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 4,
    },
    "mimo_v2_flash": {"head_dim": 12, "num_key_value_heads": 2},  # sliding layers have twice as many
    "minimax_m3_vl_text": {"dense_intermediate_size": 32, "rotary_dim": 4},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 4,
        "moe_shared_expert_intermediate_size": 16,
    },
    "phimoe": {"router_jitter_noise": 0.0},  # else sparsemixer samples in train mode; at 0 the router gets no gradient
    "qwen3_5_moe_text": HYBRID_LAYERS,
    "qwen3_next": HYBRID_LAYERS,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}

# Further differences in transformers before the version. Remove them with support for it.
OLDER: dict[str, dict[str, dict]] = {
    "5.20": {"qwen4_exp_text": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}},
    "5.14": {
        # the router is as wide as an expert
        "dbrx": {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2}},
        "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
        "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    },
    "5.2": {"jamba": {"use_mamba_kernels": False}},
}
for _version, _overrides in OLDER.items():
    if Version(transformers.__version__) < Version(_version):
        for _type, _override in _overrides.items():
            OVERRIDES[_type] = OVERRIDES.get(_type, {}) | _override


def tiny_config(model_type: str, **overrides) -> PreTrainedConfig:
    """Returns a small config of `model_type`. `overrides` are fields of it (of its text config if composite)."""
    cls = CONFIG_MAPPING[model_type]
    if "text_config" in cls.sub_configs:
        text_config = tiny_config(cls.sub_configs["text_config"].model_type, **overrides)
        return cls(text_config=text_config.to_dict(), **OVERRIDES.get(model_type, {}))
    return shrunk(cls, SHRINK, OVERRIDES.get(model_type, {}), overrides)


def shrunk(cls: type[PreTrainedConfig], *sizes: dict) -> PreTrainedConfig:
    """Returns a config of `cls` with the fields in `sizes`; later ones win. `cls` may lack fields of the first."""
    # in transformers 5.0 configs are ordinary classes
    fields = (
        {f.name for f in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else set(inspect.signature(cls).parameters)
    )
    common, *own = (
        {name if name in fields else cls.attribute_map.get(name, name): value for name, value in part.items()}
        for part in sizes
    )
    values = {name: value for name, value in common.items() if name in fields}
    for part in own:
        values |= part
    return cls(**values)


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """
    Returns a random model of `model_type` in eval mode, the same for the same `seed`. `overrides` as in `tiny_config`.

    Every trainable parameter is random. Selection biases are not trainable and keep their initial value, mostly zero.
    """
    config = tiny_config(model_type, **overrides)
    return random_model(AutoModelForCausalLM, config, seed, dtype)


def random_model(auto, config: PreTrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns a model of the class in `auto` for `config`, with every trainable parameter random."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype)
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if any(
                part in name for part in getattr(model, "_get_dtype_plan", lambda _: ())(dtype)
            ):  # as `from_pretrained` does
                tensor.data = tensor.data.float()
        for name, param in model.named_parameters():
            if not param.requires_grad:
                continue
            noise = torch.randn(param.shape)
            if param.ndim < 2:  # norms, biases, decays stay near their initial values
                param.add_(0.1 * noise)
            else:
                param.copy_(noise * (0.5 if ROUTER.search(name) else 0.2))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # expert indices by token id, zero until loaded
                experts = config.get_text_config().num_local_experts
                buffer.copy_(torch.rand(buffer.shape[0], experts).argsort()[:, : buffer.shape[1]])
    return model.eval()


def tiny_batch(model: PreTrainedModel, batch: int = 2, seq: int = 8, padded: bool = True, seed: int = 0) -> dict:
    """Random `input_ids`, `attention_mask` and `labels`; with `padded`, row `i` is shorter than row `i - 1`."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.get_text_config().vocab_size
    input_ids = torch.randint(FIRST_PLAIN_ID, vocab_size, (batch, seq), generator=generator)
    lengths = seq - torch.arange(batch) * seq // (2 * batch) * padded
    attention_mask = (torch.arange(seq) < lengths[:, None]).long()
    inputs = {
        "input_ids": input_ids.masked_fill(attention_mask == 0, SHRINK["pad_token_id"]),
        "attention_mask": attention_mask,
        "labels": input_ids.masked_fill(attention_mask == 0, -100),
    }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def set_prices(model: PreTrainedModel, seed: int = 0) -> phb.PhiBalancer:
    """Sets uneven means, and so known prices, in a patched model. Returns its balancer."""
    balancer = phb.get_balancer(model)
    generator = torch.Generator().manual_seed(seed)
    state = balancer.state_dict()
    for name, mean in state.items():
        if ".mean_" in name:
            mean.copy_(torch.softmax(torch.randn(mean.shape, generator=generator, dtype=torch.float32), -1))
    balancer.load_state_dict(state)
    return balancer
