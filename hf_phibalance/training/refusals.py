"""Refuses ways of training in which the coefficient would not be the configured one."""

from __future__ import annotations

import torch.distributed as dist
from transformers import Trainer

from ..balancing import PhiBalancer, describe_router


def refuse_ranks_apart(trainer: Trainer) -> None:
    """Refuses a `Trainer` that evaluated before training: it leaves the model out of `DistributedDataParallel`."""
    kind = trainer.accelerator.distributed_type
    if getattr(trainer.model, "is_distributed_loading_by_transformers", False):
        return  # it averages its gradients by itself
    if trainer.args.world_size > 1 and kind.value.startswith("MULTI_") and trainer.model_wrapped is trainer.model:
        raise RuntimeError(
            f"{trainer.args.world_size} processes train without exchanging gradients, since trainer.evaluate() ran before "
            "trainer.train() (transformers then skips DistributedDataParallel). Evaluate with another Trainer, or after "
            "training."
        )


def refuse_trained_routers(balancer: PhiBalancer) -> None:
    """Refuses adapters on the routers with `method="frozen"`, which freezes only their own parameters. Raises `ValueError`."""
    if not balancer.config.rules.freezes:
        return
    rows = [describe_router(name, balancer.root) for name in balancer.layer_names]
    trained = [f"{row.name} ({row.how})" for row in rows if row.how != "frozen"]
    if trained:
        raise ValueError(
            f"method={balancer.config.method!r}, but {len(trained)} of {len(rows)} routers are trained: {', '.join(trained[:4])}. "
            "Leave them out of the adapter, e.g. by phb.lora_config(model, router='frozen'), or choose another method."
        )


def refuse_unknown_scaling(trainer: Trainer, process_group: dist.ProcessGroup | None) -> None:
    """Refuses ways of training where the divisor of the gradients, or their ranks, are not known. Raises `ValueError`."""
    sizes = (("cp_size", trainer.get_cp_size()), ("sp_size", trainer.get_sp_size()))
    cut = ", ".join(f"{name}={size}" for name, size in sizes if size > 1)
    if cut:
        raise ValueError(
            f"{cut}: ranks hold parts of the same rows, while a Trainer "
            "hands over whole rows to be counted, so the coefficient would be wrong by that factor. Spread the model by "
            "DistributedConfig(fsdp_size=..., tp_size=..., ep_size=...) instead; or write the loop yourself, and give "
            "begin_step() the parts that this rank holds."
        )
    tp_size = trainer.get_tp_size()
    if tp_size > 1 and tp_size != getattr(trainer.model, "tp_size", None) and process_group is None:
        raise ValueError(
            f"tp_size={tp_size}, but not by transformers (from_pretrained(tp_plan=...)): some ranks share tokens, so the "
            "data-parallel ranks cannot be told from the world size. Pass them: phb.attach(trainer, process_group=...)."
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"this process drives {trainer.args.n_gpu} GPUs by torch.nn.DataParallel, whose threads would count into the "
            "same statistics. Launch one process per GPU (accelerate launch, torchrun), or set CUDA_VISIBLE_DEVICES."
        )
    if trainer.is_deepspeed_enabled and trainer.args.fp16:
        raise ValueError(
            "DeepSpeed keeps its fp16 loss scale to itself, so the strength of the price gradient would be unknown. "
            "Train with bf16=True."
        )
