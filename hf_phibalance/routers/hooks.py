"""Hooks on the routers of a model: no class, parameter or buffer changes.

Forward hooks see a router wherever its forward may hide (in its class, in an instance that accelerate dispatched, in a
parametrisation of PEFT, inside FSDP or DDP), keep `isinstance` and state-dict keys, and can be removed without trace.
What they see goes to a [`RouterReader`], for instance a census; a [`RouterBalancer`] also adds to gradient and selection.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .contract import linear_logits
from .discovery import Reading, RouterSite
from .inside import BiasedTopK, rank_scores


class RouterReader(Protocol):
    """Who is told what the routers of a model do."""

    @property
    def sites(self) -> Sequence[RouterSite]:
        """The routers."""

    @property
    def owner(self) -> nn.Module | None:
        """The module that the reader belongs to; a copy of it gets a reader of its own."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to look at in the forward under way."""

    def choice_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` in force in the selection of router `index`, for those that do not return their choice."""

    def observe(self, index: int, hidden: Tensor | None, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """
        Router `index` received `hidden`, made `logits (T, E)` and selected `selected (..., k)`. What is returned replaces
        `carrier`, the output through which the task's gradient reaches the router.
        """


class RouterBalancer(RouterReader, Protocol):
    """A reader that also adds a bias to the selection."""

    def selection_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that the selection of router `index` has to add."""

    def observe_scores(self, index: int, scores: Tensor, are_probs: bool) -> None:
        """Router `index` ranked `scores (..., E)`, to which its bias was added."""


class _Hook:
    """A removable hook that follows its reader when the reader's owner is copied, and shares it when a router alone is."""

    def __init__(self, reader: Any, index: int) -> None:
        self.reader, self.index = reader, index

    def __deepcopy__(self, memo: dict) -> _Hook:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if id(self.reader.owner) in memo:
            twin.reader = copy.deepcopy(self.reader, memo)
        return twin


class RouterHook(_Hook):
    """Forward hook of one router. Where its block makes the choice, it only notes the logits."""

    reader: RouterReader

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        reader, site = self.reader, self.reader.sites[self.index]
        if reader.is_idle:
            return None
        parts = output if isinstance(output, tuple) else (output,)
        at = site.read(parts)
        logits = linear_logits(args[0], module) if at.logits is None else parts[at.logits]
        if site.kind.block is not None:
            site.noted = logits
            return None
        parts = self._observe(module, args[0] if args else None, logits, parts, at)
        return parts if isinstance(output, tuple) else parts[0]

    def _observe(
        self, router: nn.Module, hidden: Tensor | None, logits: Tensor, parts: Sequence[Any], at: Reading
    ) -> tuple:
        """`parts`, in which the carrier adds the auxiliary gradient."""
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
        """The selection `(T, k)` of a router that does not return it."""
        site, bias = self.reader.sites[self.index], self.reader.choice_bias(self.index)
        are_probs = site.kind.traits.ranks == "probs"
        scores = torch.softmax(logits, -1, dtype=logits.dtype) if are_probs else logits
        ranked = scores if bias is None else rank_scores(scores, bias, are_probs=are_probs)
        return torch.ops.aten.topk(ranked, site.top_k)[1]  # the operator itself: `BiasedTopK` may be active


class ExpertsHook(RouterHook):
    """Before the experts of a block that makes the choice: the block hands them what it has come to."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if self.reader.is_idle:
            return None
        site = self.reader.sites[self.index]
        hidden, *parts = (*args, *kwargs.values())
        logits, site.noted = site.noted, None
        if logits is None:  # the block has read the weight of its router instead of calling it
            logits = linear_logits(hidden, site.router)
        parts = [hidden, *self._observe(site.router, hidden, logits, parts, site.read(parts))]
        return tuple(parts[: len(args)]), dict(zip(kwargs, parts[len(args) :]))


class BiasHook(_Hook):
    """Before and after the forward that selects: in between, the selection bias is in force."""

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


def count_groups(router: nn.Module) -> int:
    """Groups of experts to which a router first limits its choice; 1 if it does not."""
    return getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1


def arguments_by_name(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments of a call of `module` by their names."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def _show_router(reader: RouterReader, index: int, prepend: bool = False) -> list[RemovableHandle]:
    """Hooks that hand what router `index` did to `reader`."""
    site = reader.sites[index]
    # of a router that returns logits only, what an adapter around it has added to them counts
    modules = {id(m): m for m in (*site.modules, *([site.router] if site.kind.block is not None else []))}
    handles = [m.register_forward_hook(RouterHook(reader, index), prepend=prepend) for m in modules.values()]
    if site.experts is not None:
        handles.append(site.experts.register_forward_pre_hook(ExpertsHook(reader, index), with_kwargs=True))
    return handles


@contextmanager
def reading(reader: RouterReader) -> Iterator[None]:
    """While open, `reader` sees what the routers `reader.sites` do."""
    handles = [handle for index in range(len(reader.sites)) for handle in _show_router(reader, index)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def install_hooks(reader: RouterBalancer) -> None:
    """Lets `reader` see the routers of its model, and add to their gradient and selection."""
    for index, site in enumerate(reader.sites):
        _show_router(reader, index, prepend=True)
        block = site.parent if site.kind.block is not None else None
        for module in [block] if block is not None else site.modules:
            module.register_forward_pre_hook(BiasHook(reader, index, before=True))
            module.register_forward_hook(BiasHook(reader, index, before=False), prepend=True, always_call=True)


def hook_adapters(reader: RouterBalancer) -> None:
    """Hooks what has been put around routers that return logits only, since they were patched."""
    for index, site in enumerate(reader.sites):
        if site.kind.block is None or any(
            isinstance(hook, RouterHook) for hook in site.router._forward_hooks.values()
        ):
            continue
        site.router.register_forward_hook(RouterHook(reader, index))
        forget_compiled_code()


def remove_hooks(root: nn.Module, *others: Callable) -> None:
    """Removes every hook of ours, found by its type, and `others`: copies that PEFT made have no handle."""
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


def forget_compiled_code() -> None:
    """`torch.compile` does not look whether hooks have come or gone since: it would go on without them, or with them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
