"""The linear layer inside a router: the one matrix that makes its logits of hidden states."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contract import router_matrix
from .discovery import RouterSite
from .wrapping import unwrap


@dataclass(frozen=True)
class RouterLinear:
    """
    `z = weight x + bias` of a router.

    Args:
        owner (`torch.nn.Module`): the router, or the layer inside it, that is called with x.
        weight (`torch.nn.Parameter` of shape `(E, H)`), bias (`torch.nn.Parameter` of shape `(E,)`, *optional*)
    """

    owner: nn.Module
    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden_TH: Tensor) -> Tensor:
        """z `(T, E)` in fp32."""
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden_TH.float(), self.weight.float(), bias)


def find_linear(site: RouterSite) -> RouterLinear:
    """
    The linear layer of the router `site`, whose weight may be written to.

    Raises:
        ValueError: if there is no such layer, or it is quantised, sharded over ranks or offloaded; with the remedy.
    """
    router = site.router
    weight = router_matrix(router)
    for module in router.modules():
        if weight is not None and vars(module).get("weight") is weight:  # in a forward with fp32_routers, its cast
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


def has_adapter(model: nn.Module) -> bool:
    """Whether PEFT is in `model`: around it, or as layers inside it."""
    if any(callable(getattr(inner, "get_base_model", None)) for inner in unwrap(model)):
        return True
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # without it nothing can be there
    return tuners is not None and any(isinstance(module, tuners.BaseTunerLayer) for module in model.modules())


@torch.no_grad()
def ranked_of(linear: RouterLinear, hidden_TH: Tensor, scores_TE: Tensor) -> tuple[str, float]:
    """
    What the scores that a router ranks are of its linear layer's logits, and how far they are from it.

    Returns:
        `tuple[str, float]`: `"logits"`, `"probs"` or `"sigmoid"`, and the distance in units of their own spread: rounding
        if they are that, about 1 if they are something else. Scores of experts that are masked (0 or -inf) do not matter.
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
