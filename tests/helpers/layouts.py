"""
Layouts: models that transformers spreads over processes (FSDP2, HSDP, tensor and expert parallelism). Measures the
coefficient that the optimizer gets, and the number of tokens counted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from invariance import (
    COEF,
    FIELDS,
    Cell,
    Recorder,
    build_model,
    build_rows,
    collate,
    compare,
    deal,
    reference,
    trainer_run,
)
from torch import Tensor, nn

import hf_phibalance as phb


@dataclass(frozen=True)
class Layout:
    """
    A way to spread a model, as in `transformers.distributed.DistributedConfig`. The `tp_size` ranks that share a batch come one
    after another.
    """

    name: str
    sizes: dict[str, Any] = field(hash=False)

    @property
    def tp_size(self) -> int:
        return self.sizes.get("tp_size", 1)

    @property
    def batches(self) -> int:
        """Number of ranks, or groups of ranks, with a batch of their own."""
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
    """Effective over declared coefficient, the relative residual, and counted over existing tokens."""

    layout: str
    trainer: str
    model_type: str
    ratio: float
    residual: float
    counted: float


def save_models(folder: Path, model_types: Iterable[str]) -> None:
    """Writes the models that [`load_spread`] loads."""
    for model_type in model_types:
        build_model(model_type).save_pretrained(folder / model_type)


def measure_layouts(names: Iterable[str], trainers: Iterable[str], folder: str, model_type: str) -> list[LayoutResult]:
    """Measures each layout in `names` with each of `trainers`, in the present process group."""
    wanted = [layout for layout in LAYOUTS if layout.name in names]
    return [measure_layout(layout, trainer, Path(folder), model_type) for layout in wanted for trainer in trainers]


def measure_layout(layout: Layout, trainer: str, folder: Path, model_type: str, accumulation: int = 2) -> LayoutResult:
    expected = reference(model_type)
    plain, _ = layout_gradient(layout, trainer, folder / model_type, accumulation, duals=None)
    balanced, loads = layout_gradient(layout, trainer, folder / model_type, accumulation, expected.duals)
    assignments = FIELDS["num_experts_per_tok"] * sum(len(row["input_ids"]) for row in build_rows())
    counted = max((float(load.sum()) / assignments for load in loads.values()), key=lambda share: abs(share - 1))
    return LayoutResult(layout.name, trainer, model_type, *compare(balanced, plain, COEF * expected.phi), counted)


def layout_gradient(
    layout: Layout, trainer: str, checkpoint: Path, accumulation: int, duals: dict[str, Tensor] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the gradient that the optimizer receives, and the loads. Balances if there are `duals`."""
    model = load_spread(layout, checkpoint)
    balancer = None
    if duals is not None:
        balancer = phb.get_balancer(phb.patch(model, {"coef": COEF}))
        balancer.load_state_dict(duals)
    optimizer = Recorder(model)
    if trainer == "Trainer":
        balancing = "none" if duals is None else "phi"
        with _pretended_accelerator():
            cell = Cell("Trainer", "none", "fp32", accumulation, layout.batches, balancing)
            trainer_run(cell, model, optimizer, use_cpu=False)
    else:
        rows = build_rows()
        parts = deal(accumulation * layout.batches)[dist.get_rank() // layout.tp_size :: layout.batches]
        batches = [collate([rows[i] for i in part]) for part in parts]
        if balancer is not None:
            balancer.begin_step(batches)
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        optimizer.step()
        if balancer is not None:
            balancer.step()
    return optimizer.gradient, {} if balancer is None else balancer.loads()


def load_spread(layout: Layout, checkpoint: Path) -> nn.Module:
    """Loads the model of `checkpoint`, spread over the present process group."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    sizes = DistributedConfig(**layout.sizes)
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, distributed_config=sizes).train()


@contextlib.contextmanager
def _pretended_accelerator() -> Iterator[None]:
    """Makes accelerate believe that the CPU is this process's accelerator, since it spreads tensors only on those."""
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
