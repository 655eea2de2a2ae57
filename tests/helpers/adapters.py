"""Tiny models under PEFT, with adapters that have an effect."""

import copy
import re

import torch
from charging import COEF
from peft import LoraConfig, get_peft_model
from tiny import set_prices, tiny_batch

import hf_phibalance as phb


LORA = {"r": 4, "lora_alpha": 8}
PARAMETERS = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "parameters": LoraConfig(target_parameters=PARAMETERS, **LORA),
    "modules_to_save": LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"], **LORA),
    "attention": LoraConfig(target_modules=["o_proj"], **LORA),
}
POLICIES = {
    "whole model": None,
    "lora": {"router": "lora"},
    "full": {"router": "full", "targets": "experts"},
    "frozen": {"targets": "attention"},
    "router-only": {"router": "router-only"},
}
WRAPPER = re.compile(r"base_model\.model\.|base_layer\.|modules_to_save\.default\.|\.default\b")


@torch.no_grad()
def fill(model, pattern, spread):
    """Gives random values to the adapter's parameters whose names match `pattern`. A fresh adapter does nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if pattern in name:
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))


def adapted(model, adapter):
    """Returns `model` under PEFT with one of `ADAPTERS`."""
    model = get_peft_model(model, copy.deepcopy(ADAPTERS[adapter]))
    fill(model, "lora_", 0.2)
    return model.train()


def balanced(model, **policy):
    """Returns `model` under PEFT with `lora_config(**policy)`, patched."""
    model = get_peft_model(model, phb.lora_config(model, **policy))
    fill(model, "lora_B", 0.1)
    phb.patch(model.train(), {"coef": COEF})
    set_prices(model)
    return model


def assert_all_learn(model):
    """Asserts that every trainable parameter gets a gradient from one step of task and prices."""
    model(**tiny_batch(model, batch=4, seq=16)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name
    phb.get_balancer(model).step()
