"""
Custom operators for `torch.compile`: one per forward of the backbone and one per router call. The compiler does not trace into
them, so the graph stays whole. Operators take tensors and numbers only, so a forward is passed as its number, and `Forwards` as
the key of [`new_key`].
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .gradient import auxiliary_gradient


if TYPE_CHECKING:
    from .forwards import Forwards


_forwards: list[weakref.ref[Forwards]] = []


def new_key(forwards: Forwards) -> int:
    """Returns the number that stands for `forwards` in compiled code."""
    _forwards.append(weakref.ref(forwards))
    return len(_forwards) - 1


@torch.library.custom_op("phi_balance::open", mutates_args=())
def open_forward(
    mask: Tensor,
    image: Tensor | None,
    sequence: Tensor | None,
    padding: Tensor | None,
    training: bool,
    cached: bool,
    key: int,
) -> Tensor:
    """Opens a forward of the backbone with this token mask `(B, S)`; returns its number, -1 if nothing is to be counted."""
    forwards = _forwards[key]()
    if forwards is None:
        return torch.tensor(-1)
    return torch.tensor(forwards.open_compiled(mask, image, sequence, padding, training, cached))


@open_forward.register_fake
def _(mask, image, sequence, padding, training, cached, key):
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("phi_balance::observe", mutates_args=())
def observe(carrier: Tensor, logits: Tensor, selected: Tensor, number: Tensor, index: int, key: int) -> Tensor:
    """Counts a call of router `index` in forward `number`. Returns `carrier`, whose backward adds the auxiliary gradient."""
    forwards = _forwards[key]()
    if forwards is not None and int(number) >= 0:  # `number` is on the CPU
        forwards.count_compiled(int(number), index, logits, selected)
    return carrier.clone()


@observe.register_fake
def _(carrier, logits, selected, number, index, key):
    return torch.empty_like(carrier)


@torch.library.custom_op("phi_balance::add_gradient", mutates_args=())
def add_gradient(gradient_of_carrier: Tensor, logits: Tensor, number: Tensor, index: int, key: int) -> Tensor:
    """
    Returns what router `index` adds to the gradient of `logits (T, E)` in the running backward. Its first argument keeps the
    compiler from running it in the forward.
    """
    forwards = _forwards[key]()
    forward = None if forwards is None or int(number) < 0 else forwards.balancer.now.numbered.get(int(number))
    if forwards is None or forward is None:
        return torch.zeros_like(logits)
    due = forwards.due(forward, index, len(logits))
    if due is None:
        return torch.zeros_like(logits)
    settings = forwards.further_losses(forward, index, logits)
    return auxiliary_gradient(logits, *due, forwards.balancer.sites[index].scoring, *settings).to(logits.dtype)


@add_gradient.register_fake
def _(gradient_of_carrier, logits, number, index, key):
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, logits, _, number, ctx.index, ctx.key = inputs
    ctx.save_for_backward(logits, number)


def _backward(ctx: Any, gradient_of_carrier: Tensor) -> tuple:
    logits, number = ctx.saved_tensors
    added = torch.ops.phi_balance.add_gradient(gradient_of_carrier, logits, number, ctx.index, ctx.key)
    return gradient_of_carrier, added, None, None, None, None


observe.register_autograd(_backward, setup_context=_save)
