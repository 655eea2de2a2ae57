"""The models that are fine-tuned: trained once on the text of several domains and easy exercises, and kept."""

from __future__ import annotations

import itertools
import os
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hf_phibalance as phb
from hf_phibalance.maths import max_vio

from ..loop import lr_factor, parameter_groups
from ..models import build_model
from .material import Material
from .run import Base


# Shares of the domains in a step: exercises are easily learnt and weigh less than their number of domains.
EXERCISES_SHARE = 0.4


def base_path(base: Base, output: Path) -> Path:
    return output / "bases" / f"{base.name}-{base.key}-{base.material}.safetensors"


def load_base(base: Base, material: Material, output: Path) -> nn.Module:
    """
    The trained base, not patched.

    Raises:
        FileNotFoundError: if it was not trained yet.
    """
    model = build_model(base.model, material.vocab_size, base.seed, **base.model_fields)
    path = base_path(base, output)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the comparison's command, which trains it first.")
    model.load_state_dict(load_file(path))
    return model.train()


def train_base(
    base: Base, material: Material, output: Path, tell: Callable[[int], None] = lambda step: None
) -> dict[str, float]:
    """
    Trains a base and keeps its weights; what was half trained when interrupted is trained anew.

    Returns:
        `dict`: mean loss and MaxVio of the last tenth of the steps.
    """
    model = build_model(base.model, material.vocab_size, base.seed, **base.model_fields)
    phb.patch(model, phb.PhiBalanceConfig(**base.method))
    balancer = phb.get_balancer(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=base.learning_rate, betas=(0.9, 0.95), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, base.steps))
    losses, max_vios = [], []
    for step, ids in enumerate(itertools.islice(batches(material, base.rows, base.seed), base.steps)):
        balancer.begin_step([{"input_ids": ids}])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        balancer.step()
        if step >= base.steps * 9 // 10:
            losses.append(float(loss.detach()))
            max_vios.append(float(max_vio(torch.stack(list(balancer.loads().values()))).mean()))
        tell(step + 1)
    phb.unpatch(model)
    path = base_path(base, output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
    os.replace(partial, path)
    return {"loss": statistics.fmean(losses), "max_vio_global": statistics.fmean(max_vios)}


def batches(material: Material, rows: int, seed: int) -> Iterator[Tensor]:
    """Windows `(rows, S)` of all domains without end, drawn by their shares."""
    rng = random.Random(f"base {seed}")
    others = len(material.domains) - 1
    weights = [EXERCISES_SHARE if name == "exercises" else (1 - EXERCISES_SHARE) / others for name in material.domains]
    while True:
        domains = rng.choices(material.domains, weights, k=rows)
        yield torch.stack([rng.choice(material.train[domain]) for domain in domains])
