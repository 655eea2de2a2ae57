"""Routers by their contract, where the installed transformers does not declare them.

A router is a module with one matrix of E rows beside E experts, where a top-k is taken. It returns its choice itself,

    forward(hidden_states) -> router_logits (T, E), topk_weights (T, k), topk_indices (T, k), in any order

or (before transformers 5.14) logits only, and the block around it chooses; then the choice is seen where the block hands
it to the experts. [`by_contract`] can go once 5.20 is the oldest transformers that is supported: from there on every
router is declared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sources import takes_top_k
from .traits import TRAITS, RouterKind, RouterTraits
from .wrapping import INSIDE_WRAPPERS, WRAPPER_PARTS, canonical_name


# Names under which modules keep how many experts there are.
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "total_experts")


def by_contract(root: nn.Module) -> Iterator[tuple[str, nn.Module, RouterKind]]:
    """
    Modules of `root` that keep the contract.

    Yields:
        `tuple[str, nn.Module, RouterKind]`: name, module, and what its class is.
    """
    for block_name, block in root.named_modules():
        if any(WRAPPER_PARTS.search(f".{name}") for name, _ in block.named_children()):
            continue  # a wrapper, of a router perhaps
        for name, child in block.named_children():
            router = _unwrapped(child)
            count = 0 if router_matrix(router) is None else expert_count(router)
            experts = experts_beside(block, name, count) if count > 1 else None
            if experts is None or not takes_top_k(router, block, experts):
                continue
            target: type[nn.Module] = next(
                c for c in type(router).__mro__ if not c.__name__.startswith(("Parametrized", "FSDP"))
            )
            kind = RouterKind(target, traits=TRAITS.get(target.__name__, RouterTraits()))
            path = f"{block_name}.{name}".lstrip(".")
            for inner, module in child.named_modules(prefix=path):
                if isinstance(module, target) and canonical_name(inner) == canonical_name(path):
                    yield inner, module, kind


def _unwrapped(module: nn.Module) -> nn.Module:
    """What the wrappers of PEFT, FSDP, `torch.compile` and checkpointing around `module` hold."""
    inner = next((child for name, child in module.named_children() if name in INSIDE_WRAPPERS), None)
    return module if inner is None else _unwrapped(inner)


def experts_beside(block: nn.Module, router_name: str, count: int) -> nn.Module | None:
    """The child of `block` that holds `count` experts."""
    for name, child in block.named_children():
        if name != router_name and not isinstance(child, nn.modules.conv._ConvNd):
            counts = {getattr(child, attribute, None) for attribute in EXPERT_COUNTS}
            counts |= {_shape(p)[0] for p in child.parameters() if len(_shape(p)) == 3}
            if count in counts or (isinstance(child, nn.ModuleList) and len(child) == count):
                return child
    return None


def expert_count(router: nn.Module, attribute: str | None = None) -> int:
    """
    How many experts `router` chooses from: what it notes in `attribute` or one of the usual ones, else the rows of its
    matrix; 0 if neither tells.
    """
    values = (getattr(router, name, None) for name in ((attribute,) if attribute else ()) + EXPERT_COUNTS)
    linear = next((m for m in router.modules() if isinstance(m, nn.Linear)), None)
    matrix = router_matrix(router)
    # a linear layer knows its outputs where its weight is packed into fewer rows, as in 4 bits
    rows = linear.out_features if linear is not None else 0 if matrix is None else _shape(matrix)[0]
    return next((value for value in values if isinstance(value, int)), rows)


def router_matrix(router: nn.Module) -> Tensor | None:
    """The matrix of a router that has one alone: its `weight`, or else the only one inside it."""
    weight = getattr(router, "weight", None)
    matrices = [p for name, p in router.named_parameters() if len(_shape(p)) > 1 and ".lora_" not in f".{name}"]
    found = [weight] if isinstance(weight, Tensor) and len(_shape(weight)) == 2 else matrices
    return found[0] if len(found) == 1 and len(_shape(found[0])) == 2 else None


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty one between forwards


def linear_logits(hidden: Tensor, router: nn.Module) -> Tensor:
    """Logits `(T, E)` of a router that does not return them: its own linear layer once more, in fp32 as there."""
    matrix = cast(Tensor, router_matrix(router))
    return F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), matrix.float())
