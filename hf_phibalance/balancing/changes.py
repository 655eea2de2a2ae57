"""Changes of a model that can be undone: attributes, wrapped methods, the model's own auxiliary loss, the precision of routers."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..routers import REMOTE_TRAITS, RouterSite


logger = logging.get_logger(__name__)
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
# Stands for 0: some remote code computes its loss only `if alpha > 0`, but uses it in any case.
VANISHING = 1e-300
LOW = (torch.bfloat16, torch.float16)


class MISSING:
    """Stands for a missing attribute; a class, because copies and pickles keep its identity."""


class Undo:
    """Attribute changes that `restore` undoes in reverse order. Does not keep the model alive; copies of the model have it too."""

    def __init__(self) -> None:
        self._changes: list[tuple[weakref.ref[Any], str, Any, Any]] = []

    def set(self, target: Any, name: str, value: Any) -> None:
        name = getattr(type(target), "attribute_map", {}).get(name, name)
        self._changes.append((weakref.ref(target), name, vars(target).get(name, MISSING), value))
        setattr(target, name, value)

    def restore(self) -> None:
        while self._changes:
            reference, name, old, value = self._changes.pop()
            target = reference()
            if target is None or (isinstance(value, WrappedForward) and vars(target).get(name) is not value):
                continue  # our forward was wrapped since; it does nothing any more
            if old is MISSING:
                vars(target).pop(name, None)
            else:
                setattr(target, name, old)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context manager: restores the original values inside it."""
        changes = list(self._changes)
        self.restore()
        try:
            yield
        finally:
            for reference, name, _, value in changes:
                if (target := reference()) is not None:
                    self.set(target, name, value)

    def __getstate__(self) -> list[tuple]:
        return [(target, *change) for reference, *change in self._changes if (target := reference()) is not None]

    def __setstate__(self, changes: list[tuple]) -> None:
        self._changes = [(weakref.ref(target), *change) for target, *change in changes]

    def __deepcopy__(self, memo: dict[int, Any]) -> Undo:
        twin = Undo()
        for target, *change in self.__getstate__():
            copied = memo.get(id(target)) if isinstance(target, nn.Module) else copy.deepcopy(target, memo)
            if copied is not None:
                twin._changes.append((weakref.ref(copied), *copy.deepcopy(change, memo)))
        return twin


class WrappedForward:
    """
    Stands in for the forward of a module: calls `wrapper(owner, inner, ...)`. `wrapper` is a function of a module, so that it can be
    pickled; `own` is the instance's own forward, if it had one (accelerate sets such).
    """

    def __init__(self, owner: nn.Module, wrapper: Callable, own: Callable | None = None) -> None:
        self._owner, self._wrapper, self.own = weakref.ref(owner), wrapper, own
        method = type(owner).forward
        self.__name__, self.__doc__ = "forward", method.__doc__
        self.__signature__ = inspect.signature(functools.partial(method, owner) if own is None else own)

    @property
    def __func__(self) -> Callable:
        """The function of a bound method: accelerate wraps it for mixed precision, and TRL 1.9 reads its signature."""

        module: Any = self._owner()

        @functools.wraps(type(module).forward)
        def forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        forward.__signature__ = inspect.signature(type(module).forward)  # type: ignore[attr-defined]
        del forward.__wrapped__  # accelerate would take it for the forward without ours
        return forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner: Any = self._owner()
        inner = self.own or functools.partial(type(owner).forward, owner)
        return self._wrapper(owner, inner, *args, **kwargs)

    def __reduce__(self) -> tuple:
        return type(self), (self._owner(), self._wrapper, self.own)

    def __deepcopy__(self, memo: dict[int, Any]) -> WrappedForward:
        owner: Any = self._owner()
        return WrappedForward(memo.get(id(owner), owner), self._wrapper, copy.deepcopy(self.own, memo))


def wrap_forward(owner: nn.Module, wrapper: Callable, undo: Undo) -> None:
    """Replaces `owner.forward(...)` by `wrapper(owner, inner, ...)`, unless that was done already."""
    own = vars(owner).get("forward")
    if not isinstance(own, WrappedForward):
        undo.set(owner, "forward", WrappedForward(owner, wrapper, own))


# ---------------------------------------------------------------------- the model's own auxiliary loss


def switch_off_built_in_loss(root: nn.Module, undo: Undo) -> bool:
    """Sets every coefficient of the family's own auxiliary loss to 0; returns whether one was on."""
    was_on = False
    whole: Any = getattr(root, "config", None)
    for config in {id(c): c for c in (whole, whole.get_text_config())}.values() if whole is not None else ():
        was_on |= bool(getattr(config, "output_router_logits", False))
        for name, off in (("output_router_logits", False), *((name, 0.0) for name in COEFFICIENTS)):
            if getattr(config, name, off) != off:
                undo.set(config, name, off)
    for module in root.modules():
        for name in COEFFICIENTS:
            if isinstance(module, PreTrainedModel) and vars(module).get(name):
                undo.set(module, name, 0.0)
        if type(module).__name__ in REMOTE_TRAITS and (getattr(module, "alpha", None) or 0.0) > VANISHING:
            was_on = True
            undo.set(module, "alpha", VANISHING)  # coefficient of the gate's own auxiliary loss
    return was_on


def announce_switched_off() -> None:
    """Warns once, for the model's loss and the trainer's alike: TRL's trainers set theirs in the model's config too."""
    logger.warning_once(
        "φ-balancing is on: the auxiliary loss of the model or of its trainer (router_aux_loss_coef, "
        "output_router_logits) has been switched off. phb.unpatch(model) restores the model's."
    )


# ---------------------------------------------------------------------- routers in float32 inside a model of 16 bits


class CastHook:
    """
    Hook before and after a forward that uses a router's weights. In between they are seen in the model's precision, `dtypes` by the
    weights' names in the hooked module.
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
    """Casts the 16-bit weights of routers to float32, for the optimizer. Their forwards compute as before."""
    for site in sites:
        # a block that does the top-k may use the weights of its router without calling it
        for module in site.modules if site.kind.block is None or site.parent is None else [site.parent]:
            own = {id(p) for router in site.modules for p in router.parameters() if p.dtype in LOW}
            found = {name: p for name, p in module.named_parameters() if id(p) in own}
            dtypes = {name: p.dtype for name, p in found.items()}
            for parameter in found.values():
                parameter.data = parameter.data.float()
            if found and not _cast_hooks(module):  # a model that was cast to 16 bits since has them
                module.register_forward_pre_hook(CastHook(dtypes, before=True))
                module.register_forward_hook(CastHook(dtypes, before=False), always_call=True)


def restore_precision(root: nn.Module) -> None:
    """Undoes [`raise_precision`] for all modules of `root`."""
    for module in root.modules():
        for hooks, key in _cast_hooks(module):
            for name, dtype in hooks.pop(key).dtypes.items():
                parameter = module.get_parameter(name)
                parameter.data = parameter.data.to(dtype)
            module._forward_hooks_always_called.pop(key, None)


def _cast_hooks(module: nn.Module) -> list[tuple[dict[int, Any], int]]:
    """Returns the tables of hooks of `module` that hold ours, and our keys in them."""
    tables: tuple[dict[int, Any], ...] = (module._forward_pre_hooks, module._forward_hooks)
    return [(hooks, key) for hooks in tables for key, hook in hooks.items() if isinstance(hook, CastHook)]
