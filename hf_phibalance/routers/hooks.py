"""
Hooks on the routers of a model. They change no class, parameter or buffer.

Forward hooks work wherever a router's forward is: in its class, in an instance that accelerate dispatched, in a PEFT
parametrisation, inside FSDP or DDP. They keep `isinstance` and state-dict keys, and can be removed. They call a
[`RouterReader`], which observes routers. A [`RouterBalancer`] also changes their gradient and selection.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .discovery import Reading, RouterSite
from .modules import router_matrix
from .selection import BiasedTopK, rank_scores


class RouterReader(Protocol):
    """Receives the inputs and outputs of the routers of a model."""

    @property
    def sites(self) -> Sequence[RouterSite]:
        """The routers."""

    @property
    def owner(self) -> nn.Module | None:
        """The module that the reader belongs to. A copy of the module gets a copy of the reader."""

    @property
    def is_idle(self) -> bool:
        """Whether hooks have nothing to do in the current forward."""

    def choice_bias(self, index: int) -> Tensor | None:
        """Returns the bias `(E,)` in the scores of router `index`, to recompute a selection it does not return."""

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """
        Called after router `index` computed `logits (T, E)` from `hidden` and chose the experts `selected (..., k)`.
        The return value replaces `carrier`, the output through which the task's gradient reaches the router.
        """


class RouterBalancer(RouterReader, Protocol):
    """A reader that also adds a bias to the selection."""

    def selection_bias(self, index: int) -> Tensor | None:
        """Returns the bias `(E,)` for the selection of router `index`."""

    def observe_scores(self, index: int, scores: Tensor, are_probs: bool) -> None:
        """Called after router `index` ranked `scores (..., E)` plus its bias."""


class _Hook:
    """A removable hook. A copy of the reader's owner copies the reader too; a copy of a router alone shares it."""

    def __init__(self, reader: Any, index: int) -> None:
        self.reader, self.index = reader, index

    def __deepcopy__(self, memo: dict) -> _Hook:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if id(self.reader.owner) in memo:
            twin.reader = copy.deepcopy(self.reader, memo)
        return twin


class RouterHook(_Hook):
    """Forward hook of one router. For routers whose block does the top-k it only stores the logits."""

    reader: RouterReader

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        reader, site = self.reader, self.reader.sites[self.index]
        if reader.is_idle:
            return None
        parts = output if isinstance(output, tuple) else (output,)
        at = site.read(parts)
        logits = _linear_logits(args[0], module) if at.logits is None else parts[at.logits]
        if site.kind.block is not None:
            site.stored_logits = logits
            return None
        parts = self._observe(module, args[0] if args else None, logits, parts, at)
        return parts if isinstance(output, tuple) else parts[0]

    def _observe(
        self, router: nn.Module, hidden: Tensor | None, logits: Tensor, parts: Sequence[Any], at: Reading
    ) -> tuple:
        """Returns `parts` with the carrier replaced by one that adds the auxiliary gradient."""
        chosen = self._choice(logits) if at.chosen is None else parts[at.chosen]
        carrier = at.logits if at.carrier is None else at.carrier
        if carrier is None:
            raise ValueError(
                f"router {self.reader.sites[self.index].name!r} ({type(router).__name__} of transformers "
                f"{transformers.__version__}) returns nothing differentiable, so no gradient can be added."
            )
        carried = self.reader.observe(self.index, hidden, logits, chosen, parts[carrier])
        return (*parts[:carrier], carried, *parts[carrier + 1 :])

    def _choice(self, logits: Tensor) -> Tensor:
        """Computes the selection `(T, k)` of a router that does not return it."""
        site, bias = self.reader.sites[self.index], self.reader.choice_bias(self.index)
        are_probs = site.kind.traits.ranks == "probs"
        scores = torch.softmax(logits, -1, dtype=logits.dtype) if are_probs else logits
        ranked = scores if bias is None else rank_scores(scores, bias, are_probs=are_probs)
        return torch.ops.aten.topk(ranked, site.top_k)[1]  # the operator itself: `BiasedTopK` may be active


class ExpertsHook(RouterHook):
    """Pre-forward hook of the experts, if the block does the top-k. Reads the selection from their arguments."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if self.reader.is_idle:
            return None
        site = self.reader.sites[self.index]
        hidden, *parts = (*args, *kwargs.values())
        logits, site.stored_logits = site.stored_logits, None
        if logits is None:  # the block uses the weight of its router instead of calling it
            logits = _linear_logits(hidden, site.router)
        parts = [hidden, *self._observe(site.router, hidden, logits, parts, site.read(parts))]
        return tuple(parts[: len(args)]), dict(zip(kwargs, parts[len(args) :]))


class BiasHook(_Hook):
    """Turns the selection bias on before the forward that does the top-k, and off after it."""

    reader: RouterBalancer

    def __init__(self, reader: RouterBalancer, index: int, before: bool) -> None:
        super().__init__(reader, index)
        self.before = before

    def __call__(self, module: nn.Module, args: tuple, output: Any = None) -> None:
        bias = self.reader.selection_bias(self.index)
        if bias is None:
            return
        experts = self.reader.sites[self.index].num_experts
        if self.before:
            BiasedTopK(experts, bias, count_groups(module) > 1).__enter__()
        elif torch.compiler.is_compiling():
            BiasedTopK(experts, bias).__exit__(None, None, None)  # leaves the mode entered last
        elif (mode := BiasedTopK.innermost()) is not None:  # else a hook before ours has raised
            mode.__exit__(None, None, None)
            if mode.scores is not None:
                self.reader.observe_scores(self.index, mode.scores, mode.are_probs)


def _linear_logits(hidden: Tensor, router: nn.Module) -> Tensor:
    """Recomputes the logits `(T, E)` of a router that does not return them, in fp32 like the router."""
    matrix = cast(Tensor, router_matrix(router))
    return F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), matrix.float())


def count_groups(router: nn.Module) -> int:
    """Returns the number of expert groups of a router; 1 without groups."""
    return getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1


def arguments_by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Returns the arguments of a call of `module` by their names."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def _show_router(reader: RouterReader, index: int, prepend: bool = False) -> list[RemovableHandle]:
    """Hooks router `index` to `reader`."""
    site = reader.sites[index]
    # if a router returns only logits, its adapter gets a hook too, because it adds to them
    modules = {id(m): m for m in (*site.modules, *([site.router] if site.kind.block is not None else []))}
    handles = [m.register_forward_hook(RouterHook(reader, index), prepend=prepend) for m in modules.values()]
    if site.experts is not None:
        handles.append(site.experts.register_forward_pre_hook(ExpertsHook(reader, index), with_kwargs=True))
    return handles


@contextmanager
def reading(reader: RouterReader) -> Iterator[None]:
    """Context manager: inside it, `reader` observes its routers."""
    handles = [handle for index in range(len(reader.sites)) for handle in _show_router(reader, index)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def install_hooks(reader: RouterBalancer) -> None:
    """Lets `reader` change the gradient and selection of its routers, until [`remove_hooks`]."""
    for index, site in enumerate(reader.sites):
        _show_router(reader, index, prepend=True)
        block = site.parent if site.kind.block is not None else None
        for module in [block] if block is not None else site.modules:
            module.register_forward_pre_hook(BiasHook(reader, index, before=True))
            module.register_forward_hook(BiasHook(reader, index, before=False), prepend=True, always_call=True)


def hook_adapters(reader: RouterBalancer) -> None:
    """Hooks adapters that were put around routers since the patch, if the routers return only logits."""
    for index, site in enumerate(reader.sites):
        if site.kind.block is None or any(isinstance(h, RouterHook) for h in site.router._forward_hooks.values()):
            continue
        site.router.register_forward_hook(RouterHook(reader, index))
        torch.compiler.reset()  # compiled code does not notice hooks


def remove_hooks(root: nn.Module, *others: Callable) -> None:
    """Removes `others` and all our hooks. Finds them by type, because copies that PEFT made have no handle."""
    BiasedTopK.leave_interrupted()
    for module in root.modules():
        tables: list[list[dict[int, Any]]] = [
            [module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called],
            [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs],
        ]
        for hooks, *flags in tables:
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) or hook in others]:
                for table in (hooks, *flags):
                    table.pop(key, None)
