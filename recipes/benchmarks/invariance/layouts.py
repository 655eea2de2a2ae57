"""Models that transformers spreads over the ranks: the coefficient that their optimizer gets, and what they count."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import hf_phibalance as phb

from .cells import Cell
from .definition import reference
from .inputs import COEF, build_model, build_rows, collate, deal
from .steps import Recorder, trainer_run


@dataclass(frozen=True)
class Layout:
    """
    A way to spread a model. The ranks that share a batch (`tp_size` of them) come one after another.

    Args:
        sizes (`dict`): as in `transformers.distributed.DistributedConfig`.
    """

    name: str
    sizes: dict[str, Any] = field(hash=False)

    @property
    def tp_size(self) -> int:
        return self.sizes.get("tp_size", 1)

    @property
    def batches(self) -> int:
        """How many ranks, or groups of them, hold a batch of their own."""
        return self.sizes.get("fsdp_size", 1) * self.sizes.get("dp_replicate_size", 1)

    @property
    def ranks(self) -> int:
        return self.batches * self.tp_size


LAYOUTS = (
    Layout("FSDP2", {"fsdp_size": 2}),
    Layout("TP", {"tp_size": 2}),
    Layout("TP, EP by all-reduce", {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"}),
    Layout("TP, EP by all-to-all", {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}),
    Layout("FSDP2, EP", {"fsdp_size": 2, "ep_size": 2}),
    Layout("HSDP", {"dp_replicate_size": 2, "fsdp_size": 2}),
    Layout("FSDP2 × TP", {"fsdp_size": 2, "tp_size": 2}),
    Layout("FSDP2 × TP, EP in TP", {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}),
    Layout("FSDP2 × TP, EP over all", {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}),
)


@dataclass(frozen=True)
class LayoutResult:
    """Effective over declared coefficient, the relative residual, and tokens counted over tokens there are."""

    layout: str
    trainer: str
    model_type: str
    ratio: float
    residual: float
    counted: float


def save_models(folder: Path, model_types: Iterable[str]) -> None:
    """Transformers spreads what it loads: writes the models that [`measure_layout`] loads."""
    for model_type in model_types:
        build_model(model_type).save_pretrained(folder / model_type)


def measure_layouts(names: Iterable[str], trainers: Iterable[str], folder: str, model_type: str) -> list[LayoutResult]:
    """[`measure_layout`] of the layouts `names`, by each of `trainers`."""
    wanted = [layout for layout in LAYOUTS if layout.name in names]
    return [measure_layout(layout, trainer, Path(folder), model_type) for layout in wanted for trainer in trainers]


def measure_layout(layout: Layout, trainer: str, folder: Path, model_type: str, accumulation: int = 2) -> LayoutResult:
    """Projection and residual of `layout`, in the present process group of `layout.ranks`."""
    plain, _ = layout_gradient(layout, trainer, folder / model_type, accumulation, duals=None)
    expected = reference(model_type)
    balanced, loads = layout_gradient(layout, trainer, folder / model_type, accumulation, expected.duals)
    added, declared = balanced - plain, COEF * expected.phi
    ratio = float(added @ declared / (declared @ declared))
    tokens = sum(len(row["input_ids"]) for row in build_rows())
    top_k = 2
    counted = {float(load.sum()) / (top_k * tokens) for load in loads.values()}
    worst = max(counted, key=lambda share: abs(share - 1))
    return LayoutResult(
        layout.name, trainer, model_type, ratio, float((added - declared).norm() / declared.norm()), worst
    )


def layout_gradient(
    layout: Layout, trainer: str, checkpoint: Path, accumulation: int, duals: dict[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The gradient that the optimizer receives, and the loads; balanced if there are `duals`."""
    model = load_spread(layout, checkpoint)
    if duals is not None:
        phb.patch(model, {"coef": COEF})
        phb.get_balancer(model).load_state_dict(duals)
    optimizer = Recorder(model)
    if trainer == "Trainer":
        balancing = "none" if duals is None else "phi"
        cell = Cell("Trainer", "none", "fp32", accumulation, layout.batches, balancing)
        with _pretended_accelerator():
            trainer_run(cell, model, optimizer, use_cpu=False)
    else:
        _loop(layout, accumulation, model, optimizer)
    return optimizer.gradient, {} if duals is None else phb.get_balancer(model).loads()


def load_spread(layout: Layout, checkpoint: Path) -> nn.Module:
    """The model of `checkpoint`, spread over the present process group."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    sizes = DistributedConfig(**layout.sizes)
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, distributed_config=sizes).train()


def _loop(layout: Layout, accumulation: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    rows = build_rows()
    parts = deal(accumulation * layout.batches)[dist.get_rank() // layout.tp_size :: layout.batches]
    batches = [collate([rows[i] for i in part]) for part in parts]
    balancer = phb.get_balancer(model) if hasattr(model.config, "phi_balance") else None
    if balancer is not None:
        balancer.begin_step(batches)
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    optimizer.step()
    if balancer is not None:
        balancer.step()


@contextlib.contextmanager
def _pretended_accelerator() -> Iterator[None]:
    """accelerate spreads tensors over accelerators only: it is told that this process has one, whose device is the CPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    prepare = PartialState._prepare_backend
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, cpu, sagemaker, backend=None: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        del os.environ["ACCELERATE_TORCH_DEVICE"]
        PartialState._prepare_backend = prepare
