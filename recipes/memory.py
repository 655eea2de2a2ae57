"""
Parameters and memory of the recipes, computed from the published architectures without weights.

python recipes/memory.py
python recipes/memory.py --processes 4 --models olmoe-1b-7b deepseek-moe-16b

Exact, per process: weights, gradients and the two moments of AdamW after a step. LoRA keeps the weights in bf16 and
trains fp32 adapters. Full fine-tuning trains fp32 weights. With sharding (FSDP2, ZeRO-3), each process holds its part,
and the largest block (a decoder layer, or embeddings with the head) gathered in bf16.

By formula, in bf16 unless noted, with activation checkpointing: the input of every layer, and the logits of a
micro-batch with their fp32 softmax and gradient. Not counted: recomputation, kernel workspace, fragmentation.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import miniature

from hf_phibalance.files import replace_unprintable


GIB = 2**30
BF16, FP32 = 2, 4
RECIPES = Path(__file__).parent
MODELS = [
    *("mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "olmoe-1b-7b"),
    *("deepseek-moe-16b", "deepseek-v2-lite", "moonlight-16b-a3b"),
]


@dataclass
class Size:
    """Numbers of parameters of a model, and its shape."""

    total: int  # of the base model
    active: int  # used by a token: of the routed experts only the chosen ones
    adapters: int  # of LoRA
    block: int  # of the largest part that sharded training gathers at a time
    layers: int
    hidden: int
    vocab: int


def measure(fields, router="lora", targets="all", r=8):
    """Returns the `Size` of the architecture `fields` (a config.json as a dict), with the adapters of the recipes."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_phibalance as phb
    from hf_phibalance.models import register_deepseek_moe
    from hf_phibalance.routers import find_routers

    register_deepseek_moe()
    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total, idle = count(model), 0
    for site in find_routers(model):
        experts = count(site.parent.experts)
        idle += experts - experts * site.top_k // site.num_experts
    layers = model.model.layers
    outside = count(model) - sum(count(layer) for layer in layers)
    block = max(*(count(layer) for layer in layers), outside)
    with torch.device("meta"):
        model = get_peft_model(
            model, phb.lora_config(model, router=router, targets=targets, r=r), low_cpu_mem_usage=True
        )
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Size(total, total - idle, adapters, block, len(layers), config.hidden_size, config.vocab_size)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def state_bytes(size, full, processes=1):
    """Returns the bytes of weights, gradients and AdamW's moments in each of `processes`."""
    trained = (size.total if full else size.adapters) * 4 * FP32  # weight, gradient, two moments
    held = trained if full else size.total * BF16 + trained
    return held / processes + (size.block * BF16 if processes > 1 else 0)


def activation_bytes(size, rows, length):
    """Returns the bytes of all layer inputs and of the logits, for a micro-batch of `rows` of `length` tokens."""
    tokens = rows * length
    return tokens * size.layers * size.hidden * BF16 + tokens * size.vocab * (BF16 + FP32 + FP32)


def table(models, processes, rows, length):
    """Returns the figures of `models` as a Markdown table, memory in GiB per GPU."""
    lines = [
        "| model | parameters | active | LoRA | LoRA: `single_gpu`, `ddp` | "
        f"LoRA: `fsdp2` on {processes} | full: `single_gpu`, `ddp` | full: `fsdp2`, `zero3` on {processes} | "
        f"activations, {rows} × {length:,} tokens |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for model in models:
        size = measure(miniature.read_architecture(f"{model}/config.json"))
        states = [state_bytes(size, full, count) for full in (False, True) for count in (1, processes)]
        memory = " | ".join(f"{value / GIB:.0f}" for value in [*states, activation_bytes(size, rows, length)])
        lines.append(
            f"| `{model}` | {size.total / 1e9:.1f} B | {size.active / 1e9:.1f} B | {size.adapters / 1e6:.0f} M | {memory} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    replace_unprintable()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="Which (default: all).")
    parser.add_argument("--processes", type=int, default=6, help="GPUs over which the state is sharded.")
    parser.add_argument("--rows", type=int, default=3, help="Rows of a micro-batch.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a row.")
    args = parser.parse_args()
    print(table(args.models, args.processes, args.rows, args.length))
