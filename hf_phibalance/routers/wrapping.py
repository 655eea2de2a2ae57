"""What models come wrapped in (PEFT, DDP, FSDP, `torch.compile`), and how to look through it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..compat import unwrap_parallel
from ..files import quoted


if TYPE_CHECKING:
    from .discovery import RouterSite


# Names under which wrappers keep what they wrap.
INSIDE_WRAPPERS = ("base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
WRAPPER_PARTS = re.compile(rf"\.({'|'.join(INSIDE_WRAPPERS)}|modules_to_save\.[^.]+)\b")


def canonical_name(name: str) -> str:
    """`name` of a module without what PEFT, DDP, FSDP, `torch.compile` and checkpoint wrappers put in."""
    return WRAPPER_PARTS.sub("", f".{name}").lstrip(".")


def check_module(model: Any) -> None:
    """
    Refuses what is not a model, such as its name or its trainer.

    Raises:
        TypeError: if `model` is not a module of torch's.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be a torch.nn.Module, got {quoted(model)}. Load a checkpoint by "
            "phb.AutoModelForCausalLM.from_pretrained(name, phi_balance=True); of a trainer or a pipeline, take its `model`."
        )


def unwrap(model: nn.Module) -> list[nn.Module]:
    """`model` and what it wraps, outermost first: compiled, data-parallel and PEFT models down to the transformers one."""
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
    """Returns whether the head of a model makes logits of its vocabulary, unlike a classifier or a model without a head."""
    root: Any = unwrap(model)[-1]
    return not hasattr(root, "get_output_embeddings") or root.get_output_embeddings() is not None


def find_backbone(root: nn.Module, sites: Sequence[RouterSite]) -> nn.Module:
    """
    The body of the transformers model `root`, `root.base_model`: what gets the batch, whatever head or trainer calls it. `root`
    itself if routers are outside of its body.
    """
    routers = {id(module) for site in sites for module in site.modules}
    body = root.base_model if isinstance(root, PreTrainedModel) else root
    return body if routers <= {id(module) for module in body.modules()} else root
