"""
Unwraps modules (PEFT, DDP, FSDP, `torch.compile`), counts their experts, and finds the matrix of a router.

Shapes: T tokens, E experts, H inputs of a router.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..compat import unwrap_parallel
from ..files import quoted


if TYPE_CHECKING:
    from .discovery import RouterSite


# Names under which wrappers keep the wrapped module.
INSIDE_WRAPPERS = ("base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPER_PARTS = re.compile(rf"\.({'|'.join(INSIDE_WRAPPERS)}|modules_to_save\.[^.]+)\b")
# Attributes in which modules keep the number of their experts.
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "total_experts")


def canonical_name(name: str) -> str:
    """Returns a module's `name` without the parts that PEFT, DDP, FSDP, `torch.compile` and checkpointing insert."""
    return WRAPPER_PARTS.sub("", f".{name}").lstrip(".")


def check_module(model: Any) -> None:
    """Raises `TypeError` if `model` is not a torch module (but, for example, a name or a trainer)."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {quoted(model)}. Load a checkpoint by "
            "phb.AutoModelForCausalLM.from_pretrained(name, phi_balance=True); of a trainer or a pipeline, take its `model`."
        )


def unwrap(model: nn.Module) -> list[nn.Module]:
    """Returns `model` and the models inside it, outermost first: compiled, data-parallel, PEFT, then transformers'."""
    check_module(model)
    chain = [model]
    while True:
        inner = unwrap_parallel(chain[-1])
        if inner is chain[-1] and callable(to_base := getattr(inner, "get_base_model", None)):
            inner = to_base()
        if inner is chain[-1]:
            return chain
        chain.append(inner)


def predicts_tokens(model: nn.Module) -> bool:
    """Returns whether the model has a language-model head, unlike a classifier or a model without a head."""
    root: Any = unwrap(model)[-1]
    return not hasattr(root, "get_output_embeddings") or root.get_output_embeddings() is not None


def has_adapter(model: nn.Module) -> bool:
    """Returns whether PEFT wraps `model` or layers inside it."""
    if any(callable(getattr(inner, "get_base_model", None)) for inner in unwrap(model)):
        return True
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # an adapter cannot be there if PEFT was not imported
    return tuners is not None and any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules())


def find_backbone(root: nn.Module, sites: Sequence[RouterSite]) -> nn.Module:
    """
    Returns the body of the transformers model `root`, which gets the batches of every head and trainer. Returns `root`
    if routers are outside its body.
    """
    routers = {id(module) for site in sites for module in site.modules}
    body = root.base_model if isinstance(root, PreTrainedModel) else root
    return body if routers <= {id(module) for module in body.modules()} else root


# ---------------------------------------------------------------------- routers and experts


def unwrap_layer(module: nn.Module) -> nn.Module:
    """Returns the module inside the wrappers of PEFT, FSDP, `torch.compile` and checkpointing."""
    inner = next((child for name, child in module.named_children() if name in INSIDE_WRAPPERS), None)
    return module if inner is None else unwrap_layer(inner)


def experts_beside(block: nn.Module, router_name: str, count: int) -> nn.Module | None:
    """Returns the child of `block` that holds `count` experts."""
    for name, child in block.named_children():
        if name != router_name and not isinstance(child, nn.modules.conv._ConvNd):
            counts = {getattr(child, attribute, None) for attribute in EXPERT_COUNTS}
            counts |= {_shape(p)[0] for p in child.parameters() if len(_shape(p)) == 3}
            if count in counts or (isinstance(child, nn.ModuleList) and len(child) == count):
                return child
    return None


def expert_count(router: nn.Module, attribute: str | None = None) -> int:
    """Returns the expert count of `router`: from `attribute`, a usual attribute or its matrix's rows; 0 if unknown."""
    values = (getattr(router, name, None) for name in ((attribute,) if attribute else ()) + EXPERT_COUNTS)
    linear = next((m for m in router.modules() if isinstance(m, nn.Linear)), None)
    matrix = router_matrix(router)
    # the weight of a 4-bit linear layer is packed into fewer rows
    rows = linear.out_features if linear is not None else 0 if matrix is None else _shape(matrix)[0]
    return next((value for value in values if isinstance(value, int)), rows)


def router_matrix(router: nn.Module) -> Tensor | None:
    """Returns the matrix of a router: its `weight`, or the only matrix inside it; `None` if there are several."""
    weight = getattr(router, "weight", None)
    matrices = [p for name, p in router.named_parameters() if len(_shape(p)) > 1 and ".lora_" not in f".{name}"]
    found = [weight] if isinstance(weight, Tensor) and len(_shape(weight)) == 2 else matrices
    return found[0] if len(found) == 1 and len(_shape(found[0])) == 2 else None


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # between forwards, ZeRO-3 leaves an empty tensor


@dataclass(frozen=True)
class RouterLinear:
    """The linear layer `z = weight x + bias` of a router."""

    owner: nn.Module  # the module that is called with x: the router, or a layer inside it
    weight: Tensor  # (E, H)
    bias: Tensor | None  # (E,)

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """Returns z `(T, E)` in fp32."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden_TH.float(), self.weight.float(), bias)


def find_linear(site: RouterSite) -> RouterLinear:
    """
    Returns the linear layer of the router `site`, whose weight can be written to.

    Raises:
        ValueError: If there is no such layer, or it is quantised, sharded over ranks or offloaded.
    """
    router = site.router
    weight = router_matrix(router)
    for module in router.modules():
        if weight is not None and vars(module).get("weight") is weight:  # with fp32_routers, a forward sees a cast
            weight = module._parameters["weight"]
    if weight is None:
        raise ValueError(
            f"router {site.name!r} ({type(router).__name__}) is not one linear layer, so its logits cannot be shifted by a "
            "change of one matrix."
        )
    if not weight.is_floating_point() or weight.element_size() < 2 or type(weight) not in (nn.Parameter, Tensor):
        raise ValueError(
            f"the weight of router {site.name!r} is a {type(weight).__name__} of {weight.dtype}: quantised, or sharded over "
            "ranks. Load the model whole and without quantisation (dtype='bfloat16') in one process."
        )
    if weight.is_meta or weight.ndim != 2 or not weight.numel() or hasattr(weight, "ds_shape"):
        raise ValueError(
            f"the weight of router {site.name!r} is not in the memory of this process (offloaded, or sharded by DeepSpeed). "
            "Load the model whole, without offloading, in one process."
        )
    owner = next(m for m in router.modules() if any(p is weight for p in m.parameters(recurse=False)))
    bias = getattr(owner, "bias", None)
    fits = isinstance(bias, Tensor) and bias.shape == weight.shape[:1]
    return RouterLinear(owner, weight, bias if fits else None)


@torch.no_grad()
def ranked_of(linear: RouterLinear, hidden_TH: Tensor, scores_TE: Tensor) -> tuple[str, float]:
    """
    Returns what a router ranks, `"logits"`, `"probs"` or `"sigmoid"`, and how far its scores are from that.

    The distance is in units of the spread of the scores: near 0 if the guess is right, about 1 if it is wrong. Ignores
    scores of masked experts (0 or -inf).
    """
    z_TE, scores_TE = linear.logits(hidden_TH), scores_TE.float()
    seen_TE = torch.isfinite(scores_TE) & (scores_TE != 0)
    best = "logits", float("inf")
    for name, guess_TE in (("logits", z_TE), ("probs", z_TE.softmax(-1)), ("sigmoid", z_TE.sigmoid())):
        missed = (scores_TE - guess_TE)[seen_TE].norm()
        spread = (guess_TE - guess_TE.mean(-1, keepdim=True))[seen_TE].norm().clamp(min=1e-30)
        distance = float(missed / spread)
        best = (name, distance) if distance < best[1] else best
    return best
