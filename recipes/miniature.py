"""
`sft.py --tiny`: a miniature of a recipe's model, and a handful of generated problems.

The model keeps its class and every choice of its architecture (scoring of the router, dense layers, shared experts, compressed
attention). Only the sizes shrink.
"""

import json
from pathlib import Path


# Options that --tiny sets. The command line overrides them, the YAML file does not.
OPTIONS = [
    *("--dataset_path", "toy", "--train_problems", "16", "--validation_problems", "4", "--test_problems", "4"),
    *("--max_steps", "2", "--global_batch_size", "4", "--per_device_train_batch_size", "2", "--logging_steps", "1"),
    *("--max_new_tokens", "4", "--dtype", "float32", "--bf16", "false", "--use_cpu", "true"),
]
# Sizes of the miniature; other fields of the architecture stay as they are.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


def read_architecture(architecture):
    """Returns the fields of the config.json `architecture`, a path from this folder."""
    return json.loads((Path(__file__).parent / architecture).read_text())


def build_miniature(architecture, tokenizer):
    """Returns the model of `architecture` with random weights, `SIZES`, and the vocabulary of `tokenizer`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = read_architecture(architecture)
    fields |= {key: size for key, size in SIZES.items() if fields.get(key) is not None}
    fields["vocab_size"] = len(tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields, **ids))


def toy_functions(train, validation, test):
    """Returns rows in the form of MBPP, with one line of Python each."""
    rows = [
        {
            "task_id": i,
            "text": f"Write a function to add {i} to a number.",
            "code": f"def add_{i}(number):\n    return number + {i}",
            "test_list": [f"assert add_{i}(1) == {i + 1}"],
        }
        for i in range(train + validation + test)
    ]
    return {"test": rows[:test], "validation": rows[test : test + validation], "train": rows[test + validation :]}
