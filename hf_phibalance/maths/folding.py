"""
Folds a selection bias into the router's weight, as well as possible.

A router scores its experts by s_e = f(z_e), z = W x, and selects the k greatest of s_e + b_e. An engine without b
selects the k greatest of z. Let the threshold τ(x) lie between the k-th and the next biased score of a token. Then

    s_e + b_e > τ  ⇔  f(z_e) > τ − b_e  ⇔  z_e + β_e > f⁻¹(τ),    β_e(x) = f⁻¹(τ) − f⁻¹(τ − b_e),

so the top-k of z + β is exactly the top-k of s + b. For logits β = b, and for sigmoids f⁻¹ is the logit. For softmax
probabilities z_e = log p_e + log Z. log Z cancels, so β_e = −log(1 − b_e/τ). A term that is equal for all experts of a
token, like f⁻¹(τ), changes no selection and is removed.

β depends on the token through τ, but W' x has to approximate W x + β. The best W' on a sample of inputs is a ridge
regression, W' − W = E[β xᵀ] (E[x xᵀ] + λ)⁻¹. It is good if the inputs share a direction, as hidden states do. To
measure this, v = (E[x xᵀ] + λ)⁻¹ E[x] regresses the constant 1 on the inputs. If r² = E[x]ᵀ v is near 1, v·x is near 1
for every token, and β vᵀ acts like a bias. If the router has a bias of its own, that bias takes the mean of β exactly
(r² = 1), and the weight takes the rest.

Shapes: T tokens, E experts, H inputs of the router.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


RIDGE = 1e-4  # λ as a share of the mean square of an input
# If τ − b is 0 or below (for a sigmoid also 1 or above), no shift is large enough. So τ − b stays at least this share
# of τ away from 0 (and this share of 1 − τ away from 1), which a shift of 4.6 makes up for.
SMALLEST = 1e-2
SATURATED = 1e-3  # smallest distance of a sigmoid's threshold from 0 and 1, where logits diverge


def selection_threshold(biased_TE: Tensor, top_k: int) -> Tensor:
    """Returns τ `(T, 1)`: the mean of the k-th and (k+1)-th largest of `biased_TE (T, E)`; the k-th if it is last."""
    best = biased_TE.topk(min(top_k + 1, biased_TE.shape[-1]), dim=-1).values
    last, following = best[..., top_k - 1 : top_k], best[..., top_k:]
    return torch.where(torch.isfinite(following), (last + following) / 2, last) if following.numel() else last


def logit_shift(bias_E: Tensor, threshold_T1: Tensor, ranked: str) -> Tensor:
    """
    Returns β `(T, E)`, centred over the experts. The top-k of `z + β` is the top-k of the biased scores. `ranked` is
    what the router ranks: `"logits"`, `"probs"` or `"sigmoid"`.
    """
    if ranked == "logits":
        shift_TE = bias_E.expand(len(threshold_T1), -1)
    elif ranked == "probs":
        shift_TE = -(1 - bias_E / threshold_T1).clamp(SMALLEST, 1 / SMALLEST).log()
    else:
        middle_T1 = threshold_T1.clamp(SATURATED, 1 - SATURATED)
        low_T1, high_T1 = SMALLEST * middle_T1, 1 - SMALLEST * (1 - middle_T1)
        shift_TE = -torch.minimum(torch.maximum(threshold_T1 - bias_E, low_T1), high_T1).logit()
    return shift_TE - shift_TE.mean(dim=-1, keepdim=True)


def score_slope(threshold_T1: Tensor, ranked: str) -> Tensor:
    """Returns df/dz at the threshold, `(T, 1)`: the score bias that equals a logit shift of 1."""
    if ranked == "logits":
        return torch.ones_like(threshold_T1)
    if ranked == "probs":
        return threshold_T1
    return threshold_T1.clamp(SATURATED, 1 - SATURATED) * (1 - threshold_T1).clamp(SATURATED, 1 - SATURATED)


@dataclass
class ShiftMoments:
    """Sums over tokens for the regression of β on x. They add up over batches and ranks."""

    flat: Tensor  # all sums in one vector, so that ranks need one all-reduce
    inputs: int
    experts: int

    @classmethod
    def zeros(cls, inputs: int, experts: int, like: Tensor) -> ShiftMoments:
        """Returns empty sums on the device of `like`, in fp64 if the device has it."""
        exact = torch.float32 if like.device.type == "mps" else torch.float64
        size = inputs * inputs + inputs * experts + inputs + experts + 2
        return cls(torch.zeros(size, dtype=exact, device=like.device), inputs, experts)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns views: Σ x xᵀ `(H, H)`, Σ x βᵀ `(H, E)`, Σ x `(H,)`, Σ β `(E,)`, Σ |β|² `()`, token count `()`."""
        h, e = self.inputs, self.experts
        xx, xb, x, b, bb, n = self.flat.split([h * h, h * e, h, e, 1, 1])
        return xx.view(h, h), xb.view(h, e), x, b, bb[0], n[0]

    def add(self, x_TH: Tensor, shift_TE: Tensor) -> None:
        """Adds tokens with inputs `x_TH` and shifts `shift_TE`, both fp32."""
        xx, xb, x, b, bb, n = self.parts()
        xx += x_TH.T @ x_TH
        xb += x_TH.T @ shift_TE
        x += x_TH.sum(0)
        b += shift_TE.sum(0)
        bb += shift_TE.square().sum()
        n += len(x_TH)


@dataclass(frozen=True)
class FoldedShift:
    """The change of a router that replaces its selection bias."""

    weight: Tensor  # W' − W, (E, H)
    bias: Tensor | None  # change of the router's own bias (E,), if it has one
    constant: Tensor  # v (H,), with v·x near 1
    r2: float  # share of the constant 1 that the inputs explain; 1 if the router has a bias of its own
    explained: float  # share of β that W' − W and the bias explain


def fold_shift(moments: ShiftMoments, own_bias: bool, ridge: float = RIDGE) -> FoldedShift:
    """
    Regresses β on the inputs of a router. With `own_bias`, the router has a bias of its own, which takes the mean.
    `ridge` is λ as a share of the mean square of an input. Raises `ValueError` if there is no token.
    """
    xx, xb, x, b, bb, n = moments.parts()
    if not n:
        raise ValueError("there is no token to regress on.")
    xx, xb, x, b, bb = xx / n, xb / n, x / n, b / n, bb / n
    if own_bias:
        slope_HE = _ridge(xx - torch.outer(x, x), xb - torch.outer(x, b), ridge)
        bias_E, constant_H, r2 = b - x @ slope_HE, torch.zeros_like(x), 1.0
    else:
        solved = _ridge(xx, torch.cat([xb, x[:, None]], dim=1), ridge)
        slope_HE, constant_H = solved[:, :-1], solved[:, -1]
        bias_E, r2 = torch.zeros_like(b), float(x @ constant_H)
    # E|β − Dᵀx − c|² = E|β|² − 2 tr(Dᵀ E[xβᵀ]) + tr(Dᵀ E[xxᵀ] D) − 2 c·E[β] + 2 c·Dᵀ E[x] + |c|²
    missed = bb - 2 * (slope_HE * xb).sum() + (slope_HE * (xx @ slope_HE)).sum()
    missed = missed - 2 * bias_E @ b + 2 * bias_E @ (x @ slope_HE) + bias_E @ bias_E
    explained = 1.0 - float(missed / bb) if bb > 0 else 1.0
    return FoldedShift(slope_HE.T.contiguous(), bias_E if own_bias else None, constant_H, r2, explained)


def _ridge(gram_HH: Tensor, cross_HN: Tensor, ridge: float) -> Tensor:
    """Returns `(gram + λ)⁻¹ cross` with λ = ridge · the mean of the diagonal of `gram`."""
    damping = (ridge * gram_HH.diagonal().mean()).clamp(min=torch.finfo(gram_HH.dtype).tiny)
    return torch.linalg.solve(gram_HH + damping * torch.eye(len(gram_HH)).to(gram_HH), cross_HN)
