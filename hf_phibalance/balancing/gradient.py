"""
Adds the auxiliary gradient of a router in the backward: coef · q / N for each token, through the routing probabilities.

It is added in the backward, so it reaches the router whatever a trainer does with the loss. N and the loss scale are known only
then, so they are looked up there. Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..maths import price_gradient


# Returns what a router adds in the running backward: weight of each token (T,), and coef · q (E,); `None` for nothing.
Due = Callable[[], "tuple[Tensor, Tensor] | None"]


def add_gradient(
    carrier: Tensor, logits: Tensor, scoring: str, due: Due, z_loss: float = 0.0, sequence_price: Tensor | None = None
) -> Tensor:
    """
    Makes the backward of `carrier` add the gradient of Σ_t weight_t (⟨coef · q + sequence price, p_t⟩ + z_loss · lse_t²) to
    the gradient of the logits. Returns the tensor that replaces `carrier`.

    If the task's gradient passes the router's own softmax, the price is added to the gradient of the probabilities there. This
    takes one kernel and saves nothing, since the router's own backward does the rest. Else a node of ours adds the closed form.

    Args:
        carrier (`torch.Tensor`): an output of the router through which the task's gradient flows back.
        logits (`torch.Tensor` of shape `(T, E)`), scoring (`str`): of the router.
        due (`Callable`): see `Due`.
        z_loss (`float`, *optional*, defaults to `0.0`), sequence_price (`torch.Tensor` of shape `(T, E)`, *optional*): further losses.
    """
    plain = scoring == "softmax" and not z_loss and sequence_price is None
    node = _softmax_node(carrier, logits) if plain else None
    if node is None:
        return _AuxiliaryGradient.apply(carrier, logits, scoring, due, z_loss, sequence_price)

    def add_price(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor, ...] | None:
        gradient = gradients[0]
        found = None if gradient is None else due()
        if gradient is None or found is None:
            return None
        weight_T, price_E = found
        gradient_TE = gradient.reshape(-1, len(price_E))
        return (torch.addr(gradient_TE, weight_T.to(gradient_TE), price_E.to(gradient_TE)).view_as(gradient),)

    node.register_prehook(add_price)
    return carrier


class _AuxiliaryGradient(torch.autograd.Function):
    """Identity on `carrier`. Its backward adds the auxiliary gradient to the gradient of `logits`."""

    @staticmethod
    def forward(ctx, carrier, logits, scoring, due, z_loss, sequence_price):
        ctx.save_for_backward(logits)
        ctx.due, ctx.settings = due, (scoring, z_loss, sequence_price)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, gradient):
        (logits,) = ctx.saved_tensors  # first: under checkpointing this runs the router again
        found = ctx.due()
        if found is None:
            return gradient, None, None, None, None, None
        added = auxiliary_gradient(logits, *found, *ctx.settings)
        return gradient, added.to(logits.dtype), None, None, None, None


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


def _softmax_node(carrier: Tensor, logits: Tensor) -> Any:
    """Returns the autograd node of the router's softmax over `logits`, in fp32 or better, between `carrier` and them; or `None`."""
    seen: set[Any] = set()
    frontier: set[Any] = {carrier.grad_fn}
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
