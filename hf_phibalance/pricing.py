"""The maths between router logits and gradients: routing probabilities, and the gradient of what they are charged.

Every router of transformers turns its logits z into routing probabilities of the form p = s(z) / Σ s(z) with an
elementwise positive score s: exp (softmax), the logistic function (sigmoid routers; p is then the normalised
affinity), or sqrt(softplus). So one closed form covers them all. With L = ⟨q, p⟩ and q constant,

    ∂L/∂z_j = p_j · (d log s / dz)(z_j) · (q_j − ⟨q, p⟩)

which for softmax is p ⊙ (q − ⟨q, p⟩). Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """An elementwise score `s` and `dlog = d log s / dz`; both map `(T, E)` to `(T, E)`."""

    score: Callable[[Tensor], Tensor]
    dlog: Callable[[Tensor], Tensor]


SCORINGS: dict[str, Scoring] = {
    "softmax": Scoring(lambda z: torch.softmax(z, dim=-1), torch.ones_like),
    "sigmoid": Scoring(torch.sigmoid, lambda z: torch.sigmoid(-z)),
    "sqrtsoftplus": Scoring(lambda z: F.softplus(z).sqrt(), lambda z: torch.sigmoid(z) / (2 * F.softplus(z))),
    # routers that return probabilities instead of logits: s is what they return
    "probs": Scoring(lambda z: z, torch.reciprocal),
}


def routing_probs(logits: Tensor, scoring: str) -> Tensor:
    """Routing probabilities p `(T, E)` of `logits (T, E)`, in at least fp32."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    scores = SCORINGS[scoring].score(z)
    return scores if scoring == "softmax" else scores / scores.sum(dim=-1, keepdim=True)


def price_gradient(logits: Tensor, price: Tensor, scoring: str) -> Tensor:
    """
    Closed form of ∂⟨price, p⟩/∂logits for every token.

    Args:
        logits (`torch.Tensor` of shape `(T, E)`): what the router returned.
        price (`torch.Tensor` of shape `(E,)`): the dual q, a constant.
        scoring (`str`): a key of `SCORINGS`.

    Returns:
        `torch.Tensor` of shape `(T, E)`, in at least fp32.
    """
    probs = routing_probs(logits, scoring)
    price = price.to(probs.dtype)
    paid = (probs * price).sum(dim=-1, keepdim=True)  # (T, 1); not a matmul, which autocast would round
    gradient = (price - paid).mul_(probs)  # in place, so that it stays in the cache
    if scoring != "softmax":
        gradient.mul_(SCORINGS[scoring].dlog(logits.to(probs.dtype)))
    return gradient


class ChargePrices(torch.autograd.Function):
    """
    Identity on `carrier` whose backward adds `rate_T · ∂⟨price, p⟩/∂logits` to the gradient of `logits`.

    The carrier is any output of the router through which the task gradient flows back (the top-k weights), so the
    charge reaches the router whatever the trainer does with the loss, and is paid once per backward.

    `price` and `rate` are kept as attributes and not as saved tensors: under non-reentrant checkpointing saved tensors
    are recomputed, and must not come from a state that has moved on meanwhile.
    """

    @staticmethod
    def forward(ctx, carrier: Tensor, logits: Tensor, price: Tensor, rate: Tensor, scoring: str) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.price, ctx.rate, ctx.scoring = price, rate, scoring
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad_carrier: Tensor):
        (logits,) = ctx.saved_tensors
        charge = price_gradient(logits, ctx.price, ctx.scoring).mul_(ctx.rate.unsqueeze(-1))
        return grad_carrier, charge.to(logits.dtype), None, None, None
