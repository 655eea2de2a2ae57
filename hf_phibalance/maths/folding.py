"""
A selection bias as a part of the router's weight, as far as that can be.

A router scores its experts by s_e = f(z_e), z = W x, and chooses the k greatest of s_e + b_e. An engine that knows no b
chooses the k greatest of z. Let τ(x) lie between the k-th and the next biased score of a token, then

    s_e + b_e > τ  ⇔  f(z_e) > τ − b_e  ⇔  z_e + β_e > f⁻¹(τ),    β_e(x) = f⁻¹(τ) − f⁻¹(τ − b_e),

so that logits z + β choose, without a bias, exactly what s + b chooses. Where logits are ranked β = b; where sigmoids are,
f⁻¹ is the logit; where softmax probabilities are, z_e = log p_e + log Z, and log Z is on both sides, so that
β_e = −log(1 − b_e/τ). What all experts of a token have in common in β, such as f⁻¹(τ), does not matter, and is taken off.

β changes from token to token, with τ, and W x + β is to be W' x. The best W' over the inputs of some texts is a ridge
regression, W' − W = E[β xᵀ] (E[x xᵀ] + λ)⁻¹. How good it can be is a matter of the inputs: hidden states have a direction
in common, and as far as the regression v = (E[x xᵀ] + λ)⁻¹ E[x] of the constant 1 on them succeeds, r² = E[x]ᵀ v near 1,
v·x is near 1 for each token and β vᵀ a bias. A router that adds a bias c of its own takes the mean of β as it is, r² = 1,
and its weight what is left.

Shapes: T tokens, E experts, H inputs of the router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


RANKED = ("logits", "probs", "sigmoid")  # what the top-k of a router is of
RIDGE = 1e-4  # λ as a share of the mean square of an input
# Where a bias takes the threshold of an expert to 0 or below (or a sigmoid's to 1 or above), no score and no shift would be
# enough: it is left with this share of τ (of 1 − τ), which a shift of 4.6 makes up for.
SMALLEST = 1e-2
SATURATED = 1e-3  # as close to 0 or 1 may the threshold of sigmoids be: beyond, logits mean nothing any more


def selection_threshold(biased_TE: Tensor, top_k: int) -> Tensor:
    """τ `(T, 1)`: halfway between the k-th and the next of `biased_TE (T, E)`, or the k-th if there is no next."""
    best = biased_TE.topk(min(top_k + 1, biased_TE.shape[-1]), dim=-1).values
    last, following = best[..., top_k - 1 : top_k], best[..., top_k:]
    return torch.where(torch.isfinite(following), (last + following) / 2, last) if following.numel() else last


def logit_shift(bias_E: Tensor, threshold_T1: Tensor, ranked: str) -> Tensor:
    """
    β `(T, E)`, without its mean over the experts: logits `z + β` choose as the scores with the bias do.

    Args:
        bias_E (`torch.Tensor` of shape `(E,)`): b.
        threshold_T1 (`torch.Tensor` of shape `(T, 1)`): τ of each token.
        ranked (`str`): one of `RANKED`.
    """
    if ranked == "logits":
        shift_TE = bias_E.expand(len(threshold_T1), -1)
    elif ranked == "probs":
        shift_TE = -(1 - bias_E / threshold_T1).clamp(SMALLEST, 1 / SMALLEST).log()
    elif ranked == "sigmoid":
        middle_T1 = threshold_T1.clamp(SATURATED, 1 - SATURATED)
        low_T1, high_T1 = SMALLEST * middle_T1, 1 - SMALLEST * (1 - middle_T1)
        shift_TE = -torch.minimum(torch.maximum(threshold_T1 - bias_E, low_T1), high_T1).logit()
    else:
        raise ValueError(f"`ranked` must be one of {', '.join(map(repr, RANKED))}, got {ranked!r}.")
    return shift_TE - shift_TE.mean(dim=-1, keepdim=True)


def score_slope(threshold_T1: Tensor, ranked: str) -> Tensor:
    """df/dz at the threshold `(T, 1)`: what a shift of the logits by 1 is worth as a bias on the scores there."""
    slopes = {
        "logits": torch.ones_like(threshold_T1),
        "probs": threshold_T1,
        "sigmoid": threshold_T1.clamp(SATURATED, 1 - SATURATED) * (1 - threshold_T1).clamp(SATURATED, 1 - SATURATED),
    }
    return slopes[ranked]


@dataclass
class ShiftMoments:
    """
    Sums over tokens that the regression of β on x needs; they add up over batches and ranks.

    Args:
        flat (`torch.Tensor`): all of them, so that ranks need one all-reduce.
        inputs (`int`): H.
        experts (`int`): E.
    """

    flat: Tensor
    inputs: int
    experts: int

    @classmethod
    def zeros(cls, inputs: int, experts: int, like: Tensor) -> ShiftMoments:
        """No token yet; on the device of `like`, in fp64 where it has that."""
        exact = torch.float32 if like.device.type == "mps" else torch.float64
        size = inputs * inputs + inputs * experts + inputs + experts + 2
        return cls(torch.zeros(size, dtype=exact, device=like.device), inputs, experts)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Views: Σ x xᵀ `(H, H)`, Σ x βᵀ `(H, E)`, Σ x `(H,)`, Σ β `(E,)`, Σ |β|² `()` and the number of tokens `()`."""
        h, e = self.inputs, self.experts
        xx, xb, x, b, bb, n = self.flat.split([h * h, h * e, h, e, 1, 1])
        return xx.view(h, h), xb.view(h, e), x, b, bb[0], n[0]

    def add(self, x_TH: Tensor, shift_TE: Tensor) -> None:
        """Adds the tokens with inputs `x_TH` and shifts `shift_TE`, both fp32."""
        xx, xb, x, b, bb, n = self.parts()
        xx += x_TH.T @ x_TH
        xb += x_TH.T @ shift_TE
        x += x_TH.sum(0)
        b += shift_TE.sum(0)
        bb += shift_TE.square().sum()
        n += len(x_TH)


@dataclass(frozen=True)
class FoldedShift:
    """
    What to add to a router, and how good that is.

    Args:
        weight (`torch.Tensor` of shape `(E, H)`): W' − W.
        bias (`torch.Tensor` of shape `(E,)`, *optional*): what its own bias takes, if it has one.
        constant (`torch.Tensor` of shape `(H,)`): v, with v·x near 1.
        r2 (`float`): share of the constant 1 that the inputs explain; 1 if the router has a bias of its own.
        explained (`float`): share of β that W' − W and the bias explain.
    """

    weight: Tensor
    bias: Tensor | None
    constant: Tensor
    r2: float
    explained: float


def fold_shift(moments: ShiftMoments, own_bias: bool, ridge: float = RIDGE) -> FoldedShift:
    """
    The regression of β on the inputs of a router.

    Args:
        moments (`ShiftMoments`): of its tokens.
        own_bias (`bool`): whether the router adds a bias of its own, which takes the mean.
        ridge (`float`, *optional*, defaults to `1e-4`): λ as a share of the mean square of an input.

    Raises:
        ValueError: if there is no token.
    """
    xx, xb, x, b, bb, n = moments.parts()
    if not n:
        raise ValueError("there is no token to regress on.")
    xx, xb, x, b, bb = xx / n, xb / n, x / n, b / n, bb / n
    if own_bias:
        slope_HE = _ridge(xx - torch.outer(x, x), xb - torch.outer(x, b), ridge)
        return _folded(slope_HE, b - x @ slope_HE, torch.zeros_like(x), 1.0, xx, xb, x, b, bb)
    solved = _ridge(xx, torch.cat([xb, x[:, None]], dim=1), ridge)
    slope_HE, constant_H = solved[:, :-1], solved[:, -1]
    return _folded(slope_HE, None, constant_H, float(x @ constant_H), xx, xb, x, b, bb)


def _ridge(gram_HH: Tensor, cross_HN: Tensor, ridge: float) -> Tensor:
    """`(gram + λ)⁻¹ cross` with λ = ridge · the mean of its diagonal."""
    damping = (ridge * gram_HH.diagonal().mean()).clamp(min=torch.finfo(gram_HH.dtype).tiny)
    return torch.linalg.solve(gram_HH + damping * torch.eye(len(gram_HH)).to(gram_HH), cross_HN)


def _folded(
    slope_HE: Tensor,
    bias_E: Tensor | None,
    constant_H: Tensor,
    r2: float,
    xx: Tensor,
    xb: Tensor,
    x: Tensor,
    b: Tensor,
    bb: Tensor,
) -> FoldedShift:
    """With E|β − Dᵀx − c|² = E|β|² − 2 tr(Dᵀ E[xβᵀ]) + tr(Dᵀ E[xxᵀ] D) − 2 c·E[β] + 2 c·Dᵀ E[x] + |c|²."""
    missed = bb - 2 * (slope_HE * xb).sum() + (slope_HE * (xx @ slope_HE)).sum()
    if bias_E is not None:
        missed = missed - 2 * bias_E @ b + 2 * bias_E @ (x @ slope_HE) + bias_E @ bias_E
    explained = 1.0 - float(missed / bb) if bb > 0 else 1.0
    return FoldedShift(slope_HE.T.contiguous(), bias_E, constant_H, r2, explained)


def price_of_load(load_E: Tensor, wanted_E: Tensor) -> Tensor:
    """q = log(load / wanted), centred, of assignments `(E,)`; an expert without any counts as if it had half of one."""
    log_E = load_E.clamp(min=0.5).log() - wanted_E.clamp(min=0.5).log()
    return log_E - log_E.mean()
