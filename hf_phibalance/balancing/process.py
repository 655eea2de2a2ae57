"""
Everything that φ-balancing sets in the process outside the patched models, and the private names of torch that it uses.

| what | why |
|---|---|
| step hooks of all torch optimizers | a step ends when an optimizer that owns parameters of a patched model has stepped |
| wrappers on `GradScaler.scale` and `.update` | to find the scale of a loss at the root of its backward, and to notice a skipped step |
| a wrapper on `transformers.Trainer.train` | a Trainer whose model is patched announces the tokens of its steps |
| wrappers on `save_pretrained` of models, and on `PushToHubMixin._get_files_timestamps` | writes the state next to the weights, and uploads it |
| wrappers on `save_pretrained` of PEFT models, and on `load_adapter` | keep a selection bias with the adapter that it was trained with |
| `torch._dynamo.config.skip_nnmodule_hook_guards = False` | else a patched model may run code that was compiled without the patch |

[`follow`] sets them when the first model is patched; [`forget`] removes them when none is left.
"""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes


if TYPE_CHECKING:
    from .balancer import PhiBalancer


NO_NUMBER = 2**64 - 1  # of nodes that accumulate a leaf's gradient, which recompute nothing
is_stepping = False  # whether an optimizer of torch's is stepping; it may run closures
on_train: list[Callable[[Any], None]] = []  # called with a Trainer that begins to train
_balancers: list[weakref.ref[PhiBalancer]] = []  # in the order of patching, which is the same on all ranks
_undo: list[Callable[[], None]] = []
_wrappers: list[tuple[str, str, str, Callable]] = []  # module, class and method, and what to call instead
_waiting: list[tuple[str, str, str, Callable]] = []  # those of classes that are not imported yet
_scales: dict[int, tuple[Any, Tensor]] = {}  # GradScaler and scale of the loss, by number of the running backward


def balancers() -> list[PhiBalancer]:
    """Returns the balancers of all models that are patched and alive."""
    return [b for reference in _balancers if (b := reference()) is not None and b.backbone is not None]


def follow(balancer: PhiBalancer) -> None:
    """Makes optimizers, scalers and trainers of this process report to `balancer`."""
    _balancers[:] = [weakref.ref(other) for other in balancers() if other is not balancer] + [weakref.ref(balancer)]
    if not _undo:
        _waiting[:] = _wrappers
        _undo.append(register_optimizer_step_pre_hook(_before_optimizer).remove)
        _undo.append(register_optimizer_step_post_hook(_after_optimizer).remove)
        if torch._dynamo.config.skip_nnmodule_hook_guards:
            torch._dynamo.config.skip_nnmodule_hook_guards = False
            _undo.append(functools.partial(setattr, torch._dynamo.config, "skip_nnmodule_hook_guards", True))
    wrap_imported()


def forget(balancer: PhiBalancer) -> None:
    """Stops reporting to `balancer`. Restores the process if no balancer is left."""
    _balancers[:] = [weakref.ref(other) for other in balancers() if other is not balancer]
    if not _balancers:
        _waiting.clear()
        while _undo:
            _undo.pop()()


def wraps(module: str, cls: str, name: str) -> Callable[[Callable], Callable]:
    """Decorator of a function that is called as `function(inner, self, ...)` instead of a class's method `inner`."""

    def register(outer: Callable) -> Callable:
        _wrappers.append((module, cls, name, outer))
        return outer

    return register


def wrap_imported() -> None:
    """Wraps the methods of classes that have been imported since the last call, such as PEFT's, or FSDP's GradScaler."""
    scalers: list[Any] = [torch.amp.GradScaler] if _undo else []
    for scaler in scalers:  # grows by the subclasses
        scalers += scaler.__subclasses__()
        _wrap(scaler, "scale", _scale)
        _wrap(scaler, "update", _update)
    for entry in list(_waiting):
        module, name, method, outer = entry
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None:
            _waiting.remove(entry)
            _wrap(cls, method, outer)


def _wrap(cls: type, name: str, outer: Callable) -> None:
    """Replaces `cls.name(self, ...)` by `outer(inner, self, ...)`, unless `cls` inherits it."""
    inner = vars(cls).get(name)
    if inner is None or hasattr(inner, "_phi_balance"):
        return

    @functools.wraps(inner)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return outer(inner, self, *args, **kwargs)

    wrapper._phi_balance = True  # type: ignore[attr-defined]

    def restore() -> None:
        if vars(cls).get(name) is wrapper:  # else it was wrapped again since; ours does nothing without balancers
            setattr(cls, name, inner)

    setattr(cls, name, wrapper)
    _undo.append(restore)


# ---------------------------------------------------------------------- optimizers, scalers, trainers


@torch.compiler.disable
def _before_optimizer(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    global is_stepping
    is_stepping = True


@torch.compiler.disable
def _after_optimizer(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    """Ends the step of every model that has parameters of `optimizer`."""
    global is_stepping
    is_stepping = False
    skipped = getattr(optimizer, "found_inf", None)  # a fused optimizer skips on the device, without telling the host
    for balancer in balancers():
        if not in_backward():
            balancer.loop.optimizer_has_stepped(optimizer, skipped)
        elif balancer.loop.is_owned_by(optimizer) and balancer.loop.ends_after != (backward := running_backward()):
            balancer.loop.ends_after = backward  # one optimizer per parameter, stepping inside the backward
            end = functools.partial(balancer.loop.optimizer_has_stepped, optimizer, skipped)
            torch.autograd.Variable._execution_engine.queue_callback(end)


def _scale(inner: Callable, scaler: Any, outputs: Any) -> Any:
    scaled = inner(scaler, outputs)
    if scaler.is_enabled():
        for loss in [scaled] if isinstance(scaled, Tensor) else list(scaled):
            if isinstance(loss, Tensor) and loss.requires_grad:
                loss.register_hook(functools.partial(_begin_scaled, scaler))
    return scaled


def _begin_scaled(scaler: Any, grad: Tensor) -> None:
    """Notes the scale when the backward of a scaled loss begins at the loss."""
    if len(_scales) > 8:
        _scales.clear()
    _scales[running_backward()] = scaler, scaler._scale


def loss_scale() -> tuple[Any, Tensor] | None:
    """Returns the GradScaler and the scale of the loss in the running backward; `None` if it is not scaled."""
    return _scales.get(running_backward())


def _update(inner: Callable, scaler: Any, *args: Any, **kwargs: Any) -> None:
    found = [inf for state in scaler._per_optimizer_states.values() for inf in state["found_inf_per_device"].values()]
    inner(scaler, *args, **kwargs)
    for balancer in balancers():
        # an optimizer of torch's would have ended the step; others may have stepped too
        if balancer.now.scaler is scaler and any(inf.item() for inf in found):
            balancer.loop.end(skipped=True)


@wraps("transformers", "Trainer", "train")
def _train(inner: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    own = vars(trainer).get("train")
    if balancers():
        importlib.import_module("..training", __package__)  # adds to `on_train`
        for begin in on_train:
            begin(trainer)
    if vars(trainer).get("train") is not own:
        return trainer.train(*args, **kwargs)  # a callback has just wrapped it, for this call too
    return inner(trainer, *args, **kwargs)


# ---------------------------------------------------------------------- the running backward


def running_backward() -> int:
    """Returns the number of the backward that is running in this thread; -1 outside of one."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    return running_backward() != -1


def backward_node() -> int | None:
    """Returns the number of the autograd node that runs in this thread; `None` outside of a backward."""
    if not in_backward():
        return None
    node: Any = torch._C._current_autograd_node()
    number = -1 if node is None else node._sequence_nr()
    return -1 if number == NO_NUMBER else number


def next_node() -> int:
    """Returns the number of the next autograd node of this thread; later nodes have larger numbers."""
    return torch._C._autograd._get_sequence_nr()


@contextmanager
def unrecorded() -> Iterator[None]:
    """
    Context manager: hides operations from dispatch modes, and turns gradients off. Selective checkpointing is such a mode and
    expects the same operations again in the recomputation, but counting is not repeated there.
    """
    hidden = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()
    with torch.no_grad(), hidden:
        yield
