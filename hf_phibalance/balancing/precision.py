"""Routers in float32 inside a model of 16 bits: the optimizer moves float32 weights, and the forward computes as before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..routers import RouterSite


logger = logging.get_logger(__name__)
LOW = (torch.bfloat16, torch.float16)


class CastHook:
    """
    Hook before and after the forward that uses a router's weights. In between they are seen in the model's precision.

    Args:
        dtypes (`dict[str, torch.dtype]`): precision of the model, by the weights' names in the hooked module.
        before (`bool`): whether this is the hook before the forward.
    """

    def __init__(self, dtypes: dict[str, torch.dtype], before: bool) -> None:
        self.dtypes, self.before = dtypes, before

    def __call__(self, module: nn.Module, args: tuple, output: Any = None) -> None:
        for path, dtype in self.dtypes.items():
            owner_path, _, name = path.rpartition(".")
            owner = module.get_submodule(owner_path)
            parametrized = getattr(owner, "parametrizations", {})
            if name in parametrized:  # by PEFT
                if self.before:
                    parametrized[name].append(_Cast(dtype))
                elif isinstance(parametrized[name][-1], _Cast):
                    del parametrized[name][-1]
            elif self.before:  # an entry of the instance hides the parameter of the same name
                vars(owner)[name] = getattr(owner, name).to(dtype)
            else:
                vars(owner).pop(name, None)


class _Cast(nn.Module):
    """Parametrisation that casts a weight."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.to(self.dtype)


def raise_precision(sites: Iterable[RouterSite]) -> None:
    """Casts the 16-bit weights of routers to float32, for the optimizer."""
    for site in sites:
        # a block that does the top-k may use the weights of its router without calling it
        for module in site.modules if site.kind.block is None or site.parent is None else [site.parent]:
            own = {id(p) for router in site.modules for p in router.parameters() if p.dtype in LOW}
            found = {name: p for name, p in module.named_parameters() if id(p) in own}
            dtypes = {name: p.dtype for name, p in found.items()}
            for parameter in found.values():
                parameter.data = parameter.data.float()
            if found and not _hooks_of(module):  # a model that was cast to 16 bits since has them
                module.register_forward_pre_hook(CastHook(dtypes, before=True))
                module.register_forward_hook(CastHook(dtypes, before=False), always_call=True)


def restore_precision(root: nn.Module) -> None:
    """Undoes [`raise_precision`] for all modules of `root`."""
    for module in root.modules():
        for hooks, key in _hooks_of(module):
            for name, dtype in hooks.pop(key).dtypes.items():
                parameter = module.get_parameter(name)
                parameter.data = parameter.data.to(dtype)
            module._forward_hooks_always_called.pop(key, None)


def _hooks_of(module: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """The tables of hooks of `module` that hold ours, and our keys in them."""
    tables: tuple[dict[int, Any], ...] = (module._forward_pre_hooks, module._forward_hooks)
    return [(hooks, key) for hooks in tables for key, hook in hooks.items() if isinstance(hook, CastHook)]


def warn_of_rounded_routers(sites: Iterable[RouterSite]) -> None:
    """Says once if routers are trained in 16 bits, where small steps of the optimizer are rounded away."""
    weights = [p for site in sites for m in site.modules for p in m.parameters() if p.requires_grad]
    low = [p for p in weights if p.dtype in LOW]
    if low:
        dtype = str(low[0].dtype).removeprefix("torch.")
        step = 2.0 ** -(8 if low[0].dtype == torch.bfloat16 else 11)
        logger.warning_once(
            f"Routers are trained in {dtype}: a step of less than about {step:.2%} of a weight is rounded away, so at small learning "
            "rates they hardly move. Keep their weights in float32, by PhiBalanceConfig(fp32_routers=True); if that is set, the "
            "model was cast since: call phb.patch(model) again."
        )
