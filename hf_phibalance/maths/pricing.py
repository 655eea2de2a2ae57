"""
Computes routing probabilities from router logits, and the gradient of ⟨q, p⟩.

Every router of transformers turns its logits z into probabilities p = s(z) / Σ s(z) with an elementwise positive score
s: exp (softmax), the logistic function (sigmoid routers), or sqrt(softplus). One closed form covers them all. For
L = ⟨q, p⟩ and constant q,

    ∂L/∂z_j = p_j · (d log s / dz)(z_j) · (q_j − ⟨q, p⟩)

which for softmax is p ⊙ (q − ⟨q, p⟩). Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scoring(NamedTuple):
    """An elementwise score `s` and `dlog = d log s / dz`. Both map `(T, E)` to `(T, E)`."""

    score: Callable[[Tensor], Tensor]
    dlog: Callable[[Tensor], Tensor]


TINY = torch.finfo(torch.float32).tiny  # replaces the score 0 of a masked expert in a division

SCORINGS: dict[str, Scoring] = {
    "softmax": Scoring(lambda z: torch.softmax(z, dim=-1), torch.ones_like),
    "sigmoid": Scoring(torch.sigmoid, lambda z: torch.sigmoid(-z)),
    "sqrtsoftplus": Scoring(
        lambda z: F.softplus(z).sqrt(), lambda z: torch.sigmoid(z) / (2 * F.softplus(z)).clamp(min=TINY)
    ),
    # for routers that return probabilities instead of logits
    "probs": Scoring(lambda z: z, lambda z: z.clamp(min=TINY).reciprocal()),
}


def routing_probs(logits: Tensor, scoring: str) -> Tensor:
    """Returns the routing probabilities p `(T, E)` of `logits (T, E)`, in at least fp32."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    scores = SCORINGS[scoring].score(z)
    return scores if scoring == "softmax" else scores / scores.sum(dim=-1, keepdim=True).clamp(min=TINY)


def price_gradient(logits: Tensor, price: Tensor, rate: Tensor, scoring: str, z_loss: float = 0.0) -> Tensor:
    """
    Returns the gradient of Σ_t rate_t (⟨price, p_t⟩ + z_loss · logsumexp(z_t)²) with respect to the logits.

    Args:
        logits (`torch.Tensor` of shape `(T, E)`): What the router returned.
        price (`torch.Tensor` of shape `(E,)` or `(B, E)`):
            Expert prices q: the same for all tokens, or one row for each of the B equally long sequences of tokens.
        rate (`torch.Tensor` of shape `(T,)`): Weight of each token.
        scoring (`str`): A key of [`SCORINGS`].
        z_loss (`float`, *optional*, defaults to `0.0`): Coefficient of the router z-loss (arXiv 2202.08906, Eq. 5).

    Returns:
        `torch.Tensor` of shape `(T, E)`, in at least fp32.
    """
    probs = routing_probs(logits, scoring)
    price = price.to(probs.dtype).view(-1, 1, probs.shape[-1])  # (1 or B, 1, E)
    slope = (rate.to(probs.dtype).view(len(price), -1, 1) * price).view_as(probs)
    gradient = torch.ops.aten._softmax_backward_data(slope, probs, -1, probs.dtype)  # p ⊙ (slope − ⟨slope, p⟩), fused
    if scoring != "softmax":
        gradient.mul_(SCORINGS[scoring].dlog(logits.to(probs.dtype)))
    if z_loss:
        z = logits.to(probs.dtype)
        lse = z.logsumexp(dim=-1, keepdim=True)  # (T, 1)
        gradient.addcmul_((z - lse).exp_(), lse.mul_(rate.unsqueeze(-1)), value=2 * z_loss)
    return gradient


def sequence_price(logits: Tensor, scoring: str, top_k: int, mask_T: Tensor, sequence_T: Tensor) -> Tensor:
    """
    Returns the relative load of each expert in each token's sequence, `(T, E)`: the price of DeepSeek-V3's
    complementary sequence-wise loss (arXiv 2412.19437, Eqs. 17-20). The load is that of the top-k of the unbiased
    scores. `mask_T` is 0 for padding, `sequence_T` is the index of the token's sequence, below T.
    """
    scores = routing_probs(logits, scoring)
    chosen_Tk = torch.ops.aten.topk(scores, top_k)[1]  # the operator itself, so that no selection bias is added
    chosen_TE = torch.zeros_like(scores).scatter_(
        1, chosen_Tk, mask_T.to(scores.dtype).unsqueeze(-1).expand_as(chosen_Tk)
    )
    load_SE = torch.zeros_like(scores).index_add_(0, sequence_T, chosen_TE)  # S <= T
    return (load_SE * (scores.shape[-1] / load_SE.sum(-1, keepdim=True).clamp(min=1)))[sequence_T]


def price_of_load(load_E: Tensor, wanted_E: Tensor) -> Tensor:
    """Returns q = log(load / wanted), centred, from assignment counts `(E,)`. A count of 0 is taken as 0.5."""
    log_E = load_E.clamp(min=0.5).log() - wanted_E.clamp(min=0.5).log()
    return log_E - log_E.mean()
