"""Ways to fine-tune: which parameters of a patched model learn."""

from __future__ import annotations

import torch
from torch import nn

import hf_phibalance as phb


WAYS = {
    "full": "all parameters",
    "LoRA": "adapters on attention and experts, routers frozen",
    "LoRA, router by LoRA": "adapters on attention, experts and routers",
    "LoRA, router full": "adapters on attention and experts, routers whole",
    "router": "the routers' weights and nothing else",
}
_POLICIES = {"LoRA": "frozen", "LoRA, router by LoRA": "lora", "LoRA, router full": "full"}


def prepare(model: nn.Module, way: str, rank: int, seed: int) -> nn.Module:
    """
    The model whose parameters are ready to learn in this way: itself, or with adapters around its modules.

    Args:
        model (`torch.nn.Module`): A patched model.
        way (`str`): A key of `WAYS`.
        rank (`int`): Of adapters; they are scaled by 4.
        seed (`int`): Of their weights.
    """
    if way in _POLICIES:
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, phb.lora_config(model, router=_POLICIES[way], r=rank, lora_alpha=4 * rank))
    if way == "router":
        routers = {id(p) for site in phb.get_balancer(model).sites for p in site.router.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in routers)
    return model
