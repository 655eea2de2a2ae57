"""
Adds the auxiliary gradient of a router in the backward: coef · q / N for each token, through the routing probabilities.

It is added in the backward, so it reaches the router whatever a trainer does with the loss. N and the loss scale are known only
then. Shapes: T tokens, E experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..maths import price_gradient


if TYPE_CHECKING:
    from .forwards import Forwards


# Returns what a router adds in the running backward: weight of each token (T,), and coef · q (E,); `None` for nothing.
Due = Callable[[], "tuple[Tensor, Tensor] | None"]


def add_gradient(
    output: Tensor, logits: Tensor, scoring: str, due: Due, z_loss: float = 0.0, sequence_price: Tensor | None = None
) -> Tensor:
    """
    Makes the backward of `output` add the gradient of Σ_t weight_t (⟨coef · q + sequence price, p_t⟩ + z_loss · lse_t²) to
    the gradient of the logits. Returns the tensor that replaces `output`.

    If the task's gradient passes the router's own softmax, the price is added to the gradient of the probabilities there. This
    takes one kernel and saves nothing, since the router's own backward does the rest. Else a node of ours adds the closed form.

    `output` is an output of the router through which the task's gradient flows back. `due` says what to add (see `Due`). `z_loss`
    and `sequence_price (T, E)` are further losses.
    """
    plain = scoring == "softmax" and not z_loss and sequence_price is None
    node = _softmax_node(output, logits) if plain else None
    if node is None:
        return _AuxiliaryGradient.apply(output, logits, scoring, due, z_loss, sequence_price)

    def add_price(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
        gradient = gradients[0]
        found = None if gradient is None else due()
        if gradient is None or found is None:
            return None
        weight_T, price_E = found
        gradient_TE = gradient.reshape(-1, len(price_E))
        return (torch.addr(gradient_TE, weight_T.to(gradient_TE), price_E.to(gradient_TE)).view_as(gradient),)

    node.register_prehook(add_price)
    return output


class _AuxiliaryGradient(torch.autograd.Function):
    """Identity on `output`. Its backward adds the auxiliary gradient to the gradient of `logits`."""

    @staticmethod
    def forward(ctx, output, logits, scoring, due, z_loss, sequence_price):
        ctx.save_for_backward(logits)
        ctx.due, ctx.settings = due, (scoring, z_loss, sequence_price)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors  # first: under checkpointing this runs the router again
        found = ctx.due()
        added = None if found is None else auxiliary_gradient(logits, *found, *ctx.settings).to(logits.dtype)
        return gradient, added, None, None, None, None


@torch.no_grad()
def auxiliary_gradient(
    logits: Tensor,
    weight_T: Tensor,
    price_E: Tensor,
    scoring: str,
    z_loss: float = 0.0,
    sequence_price: Tensor | None = None,
) -> Tensor:
    """Returns what [`add_gradient`] adds to the gradient of `logits`, `(T, E)`, in closed form."""
    price = price_E.to(logits.device)
    if sequence_price is not None:
        price = price + sequence_price
    with torch.autocast(logits.device.type, enabled=False):
        return price_gradient(logits, price, weight_T.to(logits.device), scoring, z_loss)


def _softmax_node(output: Tensor, logits: Tensor) -> Any:
    """Returns the autograd node of the router's softmax over `logits`, in fp32 or better, between `output` and them; or `None`."""
    seen: set[Any] = set()
    frontier: set[Any] = {output.grad_fn}
    while frontier and len(seen) < 50:
        for node in frontier:
            if node is not None and node.name() == "SoftmaxBackward0":
                source = node.next_functions[0][0]
                is_cast = source is not None and source.name() == "ToCopyBackward0"
                uncast = source.next_functions[0][0] if is_cast else source
                last = logits.ndim - 1
                over_experts = node._saved_dim in (last, 2**64 - 1, -1)  # private name of torch; -1 is unsigned there
                if logits.grad_fn in (source, uncast) and over_experts and (is_cast or logits.element_size() >= 4):
                    return node
        seen |= frontier
        frontier = {after for node in frontier if node is not None for after, _ in node.next_functions} - seen
    return None


# ---------------------------------------------------------------------- torch.compile

# The compiler does not trace into custom operators, so the graph stays whole. They take tensors and numbers only: a forward is
# passed as its number, a `Forwards` by its place in this list.
_forwards: list[weakref.ref[Forwards]] = []


def new_key(forwards: Forwards) -> int:
    """Returns the number that stands for `forwards` in compiled code."""
    _forwards.append(weakref.ref(forwards))
    return len(_forwards) - 1


@torch.library.custom_op("phi_balance::open", mutates_args=())
def _open(
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
    number = forwards.begin(mask, image, sequence, padding, training, cached)
    if (forward := forwards.balancer.now.alive.get(number)) is not None:
        forward.step.kept.append(forward)  # its autograd graph does not keep it alive
    return torch.tensor(number)


@torch.library.custom_op("phi_balance::observe", mutates_args=())
def _observe(output: Tensor, logits: Tensor, selected: Tensor, number: Tensor, index: int, key: int) -> Tensor:
    """Counts a call of router `index` in forward `number`. Returns `output`, whose backward adds the auxiliary gradient."""
    forwards = _forwards[key]()
    if forwards is not None and int(number) >= 0:  # `number` is on the CPU
        forwards.count_compiled(int(number), index, logits, selected)
    return output.clone()


@torch.library.custom_op("phi_balance::add_gradient", mutates_args=())
def _add_gradient(gradient: Tensor, logits: Tensor, number: Tensor, index: int, key: int) -> Tensor:
    """
    Returns what router `index` adds to the gradient of `logits (T, E)` in the running backward. Its first argument, the gradient
    of the router's output, keeps the compiler from running it in the forward.
    """
    forwards = _forwards[key]()
    forward = None if forwards is None else forwards.balancer.now.alive.get(int(number))
    due = None if forwards is None or forward is None else forwards.due(forward, index, len(logits))
    if forwards is None or forward is None or due is None:
        return torch.zeros_like(logits)
    settings = forwards.further_losses(forward, index, logits)
    return auxiliary_gradient(logits, *due, forwards.sites[index].scoring, *settings).to(logits.dtype)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, logits, _, number, ctx.index, ctx.key = inputs
    ctx.save_for_backward(logits, number)


def _backward(ctx: Any, gradient: Tensor) -> tuple:
    logits, number = ctx.saved_tensors
    added = torch.ops.phi_balance.add_gradient(gradient, logits, number, ctx.index, ctx.key)
    return gradient, added, None, None, None, None


_open.register_fake(lambda *_: torch.empty((), dtype=torch.int64))
_observe.register_fake(lambda output, *_: torch.empty_like(output))
_add_gradient.register_fake(lambda gradient, logits, *_: torch.empty_like(logits))
_observe.register_autograd(_backward, setup_context=_save)
