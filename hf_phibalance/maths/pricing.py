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


TINY = torch.finfo(torch.float32).tiny  # in place of the score 0 of an expert that is masked, where one divides by it

SCORINGS: dict[str, Scoring] = {
    "softmax": Scoring(lambda z: torch.softmax(z, dim=-1), torch.ones_like),
    "sigmoid": Scoring(torch.sigmoid, lambda z: torch.sigmoid(-z)),
    "sqrtsoftplus": Scoring(
        lambda z: F.softplus(z).sqrt(), lambda z: torch.sigmoid(z) / (2 * F.softplus(z)).clamp(min=TINY)
    ),
    # routers that return probabilities instead of logits: s is what they return
    "probs": Scoring(lambda z: z, lambda z: z.clamp(min=TINY).reciprocal()),
}


def routing_probs(logits: Tensor, scoring: str) -> Tensor:
    """Routing probabilities p `(T, E)` of `logits (T, E)`, in at least fp32."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    scores = SCORINGS[scoring].score(z)
    return scores if scoring == "softmax" else scores / scores.sum(dim=-1, keepdim=True).clamp(min=TINY)


def price_gradient(
    logits: Tensor, price: Tensor, rate: Tensor, scoring: str, z_loss: float = 0.0, probs: Tensor | None = None
) -> Tensor:
    """
    Closed form of the gradient, with respect to the logits, of Σ_t rate_t (⟨price, p_t⟩ + z_loss · logsumexp(z_t)²).

    Args:
        logits (`torch.Tensor` of shape `(T, E)`): what the router returned.
        price (`torch.Tensor` of shape `(E,)` or `(B, E)`):
            The dual q, a constant: one for all tokens, or one for each of the B sequences in which the tokens come.
        rate (`torch.Tensor` of shape `(T,)`): weight of each token.
        scoring (`str`): a key of `SCORINGS`.
        z_loss (`float`, *optional*, defaults to `0.0`): strength of the router z-loss (arXiv 2202.08906, Eq. 5).
        probs (`torch.Tensor` of shape `(T, E)`, *optional*): `routing_probs(logits, scoring)`, where known.

    Returns:
        `torch.Tensor` of shape `(T, E)`, in at least fp32.
    """
    probs = routing_probs(logits, scoring) if probs is None else probs
    price = price.to(probs.dtype).view(-1, 1, probs.shape[-1])  # (1 or B, 1, E)
    slope = (rate.to(probs.dtype).view(len(price), -1, 1) * price).view_as(probs)
    gradient = softmax_backward(slope, probs)
    if scoring != "softmax":
        gradient.mul_(SCORINGS[scoring].dlog(logits.to(probs.dtype)))
    if z_loss:
        z = logits.to(probs.dtype)
        lse = z.logsumexp(dim=-1, keepdim=True)  # (T, 1)
        gradient.addcmul_((z - lse).exp_(), lse.mul_(rate.unsqueeze(-1)), value=2 * z_loss)
    return gradient


def softmax_backward(slope: Tensor, probs: Tensor) -> Tensor:
    """p ⊙ (g − ⟨g, p⟩) for g = `slope (T, E)` and p = `probs (T, E)`, in the one pass of torch's own kernel."""
    return torch.ops.aten._softmax_backward_data(slope, probs, -1, probs.dtype)


class ChargePrices(torch.autograd.Function):
    """
    Identity on `carrier` whose backward adds [`price_gradient`] of `price (E,)` and, where there is one, of
    `sequence_price (B, E)`, to the gradient of `logits`.

    The carrier is any output of the router through which the task gradient flows back (the top-k weights), so the
    charge reaches the router whatever the trainer does with the loss, and is paid once per backward.

    `price` and `rate` are kept as attributes and not as saved tensors: under non-reentrant checkpointing saved tensors
    are recomputed, and must not come from a state that has moved on meanwhile. What is saved is as large as the logits.
    """

    @staticmethod
    def forward(
        ctx,
        carrier: Tensor,
        logits: Tensor,
        probs: Tensor | None,
        price: Tensor,
        sequence_price: Tensor | None,
        rate: Tensor,
        scoring: str,
        z_loss: float,
    ) -> Tensor:
        ctx.saves_probs = probs is not None and probs.dtype == logits.dtype and scoring == "softmax" and not z_loss
        ctx.save_for_backward(probs if ctx.saves_probs else logits)
        ctx.price, ctx.sequence_price = price, sequence_price
        ctx.rate, ctx.scoring, ctx.z_loss = rate, scoring, z_loss
        ctx.dtype = logits.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, grad_carrier: Tensor):
        (saved,) = ctx.saved_tensors
        probs = saved if ctx.saves_probs else None
        # added here and not before: a price may be known only when the forward of all layers has ended
        price = ctx.price if ctx.sequence_price is None else ctx.price + ctx.sequence_price
        charge = price_gradient(saved, price, ctx.rate, ctx.scoring, ctx.z_loss, probs)
        return grad_carrier, charge.to(ctx.dtype), None, None, None, None, None, None


class ChargeProbs:
    """
    Gradient hook of the routing probabilities `p (..., E)` of a softmax router: adds the gradient of
    Σ_t rate_t ⟨price, p_t⟩ with respect to p, of which the router's own backward makes that of its logits. What
    [`ChargePrices`] does where nobody sees p, without a softmax of our own and without anything saved.

    Args:
        price (`torch.Tensor` of shape `(E,)`), rate (`torch.Tensor` of shape `(T,)`): read when the backward comes.
    """

    def __init__(self, price: Tensor, rate: Tensor) -> None:
        self.price, self.rate = price, rate

    def __call__(self, grad: Tensor) -> Tensor:
        grad_TE = grad.reshape(-1, grad.shape[-1])
        return torch.addr(grad_TE, self.rate.to(grad.dtype), self.price.to(grad.dtype)).view_as(grad)


def sequence_price(logits: Tensor, scoring: str, top_k: int, mask_BS: Tensor) -> Tensor:
    """
    Relative load of each expert within each sequence, `(B, E)`: the price of DeepSeek-V3's complementary sequence-wise
    loss (arXiv 2412.19437, Eqs. 17-20), with the load that the unbiased scores would choose.

    Args:
        logits (`torch.Tensor` of shape `(B·S, E)`): what the router returned.
        scoring (`str`): a key of `SCORINGS`.
        top_k (`int`): experts per token.
        mask_BS (`torch.Tensor` of shape `(B, S)`): 1 for the tokens that count.
    """
    batch, experts = len(mask_BS), logits.shape[-1]
    scores = routing_probs(logits, scoring)
    chosen = torch.ops.aten.topk(scores, top_k)[1].view(batch, -1)  # (B, S·k); the operator: no selection bias
    weight = mask_BS.to(scores.dtype).unsqueeze(-1).expand(-1, -1, top_k).reshape(batch, -1)
    load_BE = scores.new_zeros(batch, experts).scatter_add_(1, chosen, weight)
    return load_BE * (experts / load_BE.sum(-1, keepdim=True).clamp(min=1))
