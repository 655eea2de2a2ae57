"""Optimizer steps, the same in all comparisons, and measurements of models served without their selection bias."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import hf_phibalance as phb

from .measures import mean_max_vio


FITTED = 30  # last training batches, by which the bias is folded
REBALANCE = 3  # iterations; more take layers of low r² too far, at a cost in loss
PLAIN = ("dropped", "folded", "rebalanced")

Batch = dict[str, Any]  # arguments of a forward


class Diverged(Exception):
    """The loss is no longer a number. The argument is the step."""


class Step(NamedTuple):
    loss: float
    max_vio: float  # mean over layers of the step's loads
    gradient_norm: float
    milliseconds: float


def optimize(
    model: nn.Module,
    batches: Iterable[Sequence[Batch]],
    steps: int,
    learning_rate: float,
    weight_decay: float,
    precision: str = "fp32",
) -> Iterator[Step]:
    """
    Trains a patched model by AdamW, and yields the figures of each step. Raises `Diverged` if the loss is not finite.

    `batches` holds the micro-batches of each step, on the model's device. A micro-batch without `num_items_in_batch`
    is weighted by its rows. Weight decay applies to matrices only. `precision="bf16"` is autocast over fp32 weights.
    """
    balancer, device = phb.get_balancer(model), model.device.type
    groups = parameter_groups(model, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps))
    for step, parts in zip(range(steps), batches):
        start = clock(device)
        balancer.begin_step(parts)
        rows = sum(len(part["input_ids"]) for part in parts)
        total = torch.zeros((), device=device)
        for part in parts:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                loss = model(**part).loss
                if "num_items_in_batch" not in part:
                    loss = loss * (len(part["input_ids"]) / rows)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        milliseconds = 1e3 * (clock(device) - start)
        if not math.isfinite(total):
            raise Diverged(step + 1)
        yield Step(float(total), mean_max_vio(balancer.loads().values()), float(norm), milliseconds)


def clock(device: str) -> float:
    """CPU time of this process in seconds; on a GPU, wall time when all queued work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() if device == "cuda" else time.process_time()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Returns two groups: matrices with weight decay, other parameters without. Leaves out frozen parameters."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]


def lr_factor(step: int, steps: int) -> float:
    """Linear warm-up over 5% of the steps, then a cosine to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))


def served_plainly(
    model: nn.Module, batches: Sequence[Batch], examine: Callable[[nn.Module], dict[str, float]]
) -> dict[str, float]:
    """
    Measures a patched model as served by an engine without selection biases. Returns `<variant>_<figure>` for the bias
    `dropped`, `folded` into the routers' weights by the last training batches, and folded with the loads `rebalanced`.
    """
    found = {}
    for variant in PLAIN:
        twin = copy.deepcopy(model)
        if variant == "dropped":
            balancer = phb.get_balancer(twin)
            balancer.set_biases({name: torch.zeros_like(bias) for name, bias in balancer.biases().items()})
        else:
            phb.fold(twin, batches[-FITTED:], rebalance=REBALANCE if variant == "rebalanced" else 0)
        found |= {f"{variant}_{name}": value for name, value in examine(twin).items()}
    return found


def environment() -> dict[str, str]:
    """Versions that figures may depend on."""
    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def micro_batches(ids: Tensor, parts: int) -> list[Batch]:
    """Splits windows `(rows, S)` into the micro-batches of a step."""
    return [{"input_ids": part, "labels": part} for part in ids.tensor_split(parts)]
