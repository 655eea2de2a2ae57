"""Hooks on the routers of a model and on what holds them: no class, parameter or buffer changes.

Forward hooks see a router wherever its forward may hide (in its class, in an instance that accelerate dispatched, in a
parametrisation of PEFT, inside FSDP or DDP), keep `isinstance` and state-dict keys, and can be removed without trace.
What they see goes to a [`RouterReader`], for instance a census, or a [`RouterMeter`], which also answers with a charge
and a selection bias.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .contract import linear_logits
from .discovery import Reading, RouterSite
from .inside import RouterMode, Softmax, rank_scores


class RouterReader(Protocol):
    """Who is told what the routers of a model do."""

    root: nn.Module
    sites: Sequence[RouterSite]

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to look at in the forward under way."""

    @property
    def is_measuring(self) -> bool:
        """Whether [`~RouterReader.measure`] wants to see what the routers received."""

    def measure(self, index: int, module: nn.Module, hidden: Tensor, logits: Tensor) -> None:
        """Router `index` was called as `module(hidden, ...)`."""

    def choice_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that was in force in the selection of router `index`, for those that do not return their choice."""

    def observe(self, index: int, logits: Tensor, selected: Tensor, carrier: Tensor) -> Tensor:
        """Router `index` returned `logits (T, E)` and chose `selected (..., k)`; what is returned replaces `carrier`."""


class RouterMeter(RouterReader, Protocol):
    """A reader that also acts on the routers and wants to know when a forward of the backbone begins and ends."""

    softmax: Softmax | None

    def selection_bias(self, index: int) -> Tensor | None:
        """Bias `(E,)` that the selection of router `index` has to add."""

    def wants_softmax(self, index: int) -> bool:
        """Whether to note the softmax of router `index` in `softmax`."""

    def observe_scores(self, index: int, scores: Tensor) -> None:
        """Router `index` ranked `scores (T, E)`, to which its bias was added."""

    def open_forward(self, inputs: Mapping[str, Any], training: bool) -> None:
        """A forward of the backbone starts; `inputs` by argument name."""

    def close_forward(self) -> None:
        """The forward of the backbone has ended, also by an exception."""


class _Hook:
    """A removable hook that follows its reader when the whole model is copied, and shares it when a router alone is."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __deepcopy__(self, memo: dict) -> _Hook:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if id(self.reader.root) in memo:
            twin.reader = copy.deepcopy(self.reader, memo)
        return twin


class RouterHook(_Hook):
    """Forward hook of one router: statistics out, price gradient in. Of one that leaves the choice to its block: logits."""

    reader: RouterReader

    def __init__(self, reader: RouterReader, index: int) -> None:
        super().__init__(reader)
        self.index = index

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        reader, site = self.reader, self.reader.sites[self.index]
        if reader.is_idle:
            return None
        parts = output if isinstance(output, tuple) else (output,)
        at = site.read(parts)
        logits = linear_logits(args[0], module) if at.logits is None else parts[at.logits]
        if site.experts is not None:
            site.noted = logits
            return None
        paid = self._observe(module, args[0] if args else None, logits, parts, at)
        return paid if isinstance(output, tuple) else paid[0]

    def _observe(
        self, router: nn.Module, hidden: Tensor | None, logits: Tensor, parts: Sequence[Any], at: Reading
    ) -> tuple:
        """`parts` with the charge on what carries it."""
        reader = self.reader
        if reader.is_measuring and hidden is not None:
            reader.measure(self.index, router, hidden, logits)
        chosen = self._choice(logits) if at.chosen is None else parts[at.chosen]
        carrier = at.logits if at.carrier is None else at.carrier
        if carrier is None:
            raise ValueError(
                f"router {reader.sites[self.index].name!r} ({type(router).__name__} of transformers "
                f"{transformers.__version__}) returns nothing differentiable, so a price cannot be charged."
            )
        paid = reader.observe(self.index, logits, chosen, parts[carrier])
        return (*parts[:carrier], paid, *parts[carrier + 1 :])

    def _choice(self, logits: Tensor) -> Tensor:
        """The selection `(T, k)` of a router that does not return it."""
        site, bias = self.reader.sites[self.index], self.reader.choice_bias(self.index)
        scores = torch.softmax(logits, -1, dtype=logits.dtype) if site.kind.traits.ranks == "probs" else logits
        ranked = scores if bias is None else rank_scores(scores, bias)
        return torch.ops.aten.topk(ranked, site.top_k)[1]  # the operator itself: `RouterMode` may be active


class ExpertsHook(RouterHook):
    """Before the experts of a router that leaves the choice to its block: the block hands them what it has come to."""

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


class InsideHook(_Hook):
    """Before and after the forward that selects: in between, its softmax is noted and the selection bias in force."""

    reader: RouterMeter

    def __init__(self, reader: RouterMeter, index: int, before: bool, sees_router: bool) -> None:
        super().__init__(reader)
        self.index = index
        self.before = before
        self.sees_router = sees_router  # and not only the forward that ranks what the router has returned

    def __call__(self, module: nn.Module, args: tuple, output: Any = None) -> None:
        bias = self.reader.selection_bias(self.index)
        notes = self.sees_router and self.reader.wants_softmax(self.index)
        if bias is None and not notes:
            return
        site = self.reader.sites[self.index]
        experts = site.num_experts
        if self.before:
            are_probs = None if site.score_width is None else site.score_width == 1.0
            RouterMode(experts, bias, count_groups(module) > 1, notes, are_probs).__enter__()
        elif torch.compiler.is_compiling():
            RouterMode(experts, bias).__exit__(None, None, None)  # leaves the mode entered last
        elif (mode := RouterMode.innermost()) is not None:  # else a hook before ours has raised
            mode.__exit__(None, None, None)
            if notes:
                self.reader.softmax = mode.softmax
            if mode.scores is not None:
                self.reader.observe_scores(self.index, mode.scores)


def count_groups(router: nn.Module) -> int:
    """Groups of experts to which a router first limits its choice; 1 if it does not."""
    return getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1


class BackboneHook(_Hook):
    """Before and after the forward of the model that holds all routers: its attention mask tells which tokens count."""

    reader: RouterMeter

    def __init__(self, reader: RouterMeter, before: bool) -> None:
        super().__init__(reader)
        self.before = before

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any = None) -> None:
        if self.before:
            if getattr(module, "_is_replica", False):
                raise RuntimeError(
                    "the threads of torch.nn.DataParallel would count into the same statistics at once. Start one process "
                    "per GPU (torchrun, DistributedDataParallel), or use one GPU."
                )
            if not torch.compiler.is_compiling():
                RouterMode.leave_interrupted()
            self.reader.open_forward(arguments_by_name(module, args, kwargs), module.training)
        else:
            self.reader.close_forward()


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
    modules = {id(m): m for m in (*site.modules, *([site.router] if site.experts is not None else []))}
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


def install_hooks(meter: RouterMeter, backbone: nn.Module) -> None:
    """Lets `meter` see the routers of its model, and the forwards of `backbone`, which holds them all."""
    for index, site in enumerate(meter.sites):
        _show_router(meter, index, prepend=True)
        in_block = site.kind.block is not None and site.parent is not None
        for module in [site.parent] if in_block and site.parent else site.modules:
            module.register_forward_pre_hook(InsideHook(meter, index, True, sees_router=not in_block))
            module.register_forward_hook(
                InsideHook(meter, index, False, sees_router=not in_block), prepend=True, always_call=True
            )
    backbone.register_forward_pre_hook(BackboneHook(meter, before=True), with_kwargs=True)
    backbone.register_forward_hook(BackboneHook(meter, before=False), with_kwargs=True, always_call=True)


def hook_adapters(meter: RouterMeter) -> None:
    """Hooks what has been put around routers that return logits only, since they were patched."""
    for index, site in enumerate(meter.sites):
        if site.experts is None or any(isinstance(hook, RouterHook) for hook in site.router._forward_hooks.values()):
            continue
        site.router.register_forward_hook(RouterHook(meter, index))
        forget_compiled_code()


def remove_hooks(root: nn.Module) -> None:
    """Removes every hook of ours, found by its type: copies that PEFT made have no handle."""
    RouterMode.leave_interrupted()
    for module in root.modules():
        tables: list[list[dict[int, Any]]] = [
            [module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called],
            [module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs],
        ]
        for hooks, *flags in tables:
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                for table in (hooks, *flags):
                    table.pop(key, None)


def forget_compiled_code() -> None:
    """`torch.compile` does not look whether hooks have come or gone since: it would go on without them, or with them."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
