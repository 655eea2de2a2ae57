"""The figures of an inspection, from counts alone: balance against chance, and how far domains differ in their experts.

Shapes: H = 2 halves, D domains, E experts, T tokens, k experts per token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..maths import DEAD_THRESHOLD, mutual_information, mutual_information_bias, noise_floor, relative_load, summarise


FIGURES = ("max_vio", "gini", "cv", "normalised_entropy")


def chance_figures(num_experts: int, top_k: int, tokens: float) -> dict[str, float]:
    """
    What the balance figures come to by chance alone if every token picks `top_k` experts uniformly.

    An expert's count then has the relative variance `v = (E - k) / (T k)`. CV is `sqrt(v)`; Gini, half the mean absolute
    difference of two Gaussian counts that add to a constant, is `sqrt(v (E - 1) / (E π))`; the entropy lacks
    `v / (2 log E)` of its maximum; MaxVio is [`metrics.noise_floor`]. Tokens of a text are correlated, so the noise of
    real texts is larger.

    Args:
        num_experts (`int`): Number of experts `E`.
        top_k (`int`): Experts per token `k`.
        tokens (`float`): Tokens `T`.

    Returns:
        `dict[str, float]`: by the names of `FIGURES`.
    """
    variance = (num_experts - top_k) / (tokens * top_k)
    return {
        "max_vio": float(noise_floor(num_experts, top_k, float(tokens))),
        "gini": math.sqrt(variance * (num_experts - 1) / (num_experts * math.pi)),
        "cv": math.sqrt(variance),
        "normalised_entropy": max(0.0, 1.0 - variance / (2 * math.log(num_experts))) if num_experts > 1 else 1.0,
    }


def design_effect(halves_HE: Tensor, top_k: int) -> float:
    """
    How many tokens of a text are worth one that was drawn on its own, at least 1.

    Tokens of a sequence resemble each other, so that counts vary more than those of independent tokens. By how much is
    measured between two halves of the sequences: what the half tells about the expert, over what it would tell if
    tokens were independent ([`mutual_information_bias`]). What whole sequences have in common does not show.

    Args:
        halves_HE (`torch.Tensor` of shape `(2, E)`): How often each expert was chosen in each half.
        top_k (`int`): Experts per token.
    """
    independent = mutual_information_bias(halves_HE, top_k)
    return max(1.0, float(mutual_information(halves_HE)) / independent) if independent > 0 else 1.0


def balance_figures(halves_HE: Tensor, top_k: int) -> dict[str, Any]:
    """
    How evenly experts are chosen.

    Args:
        halves_HE (`torch.Tensor` of shape `(2, E)`): How often each expert was chosen in each half of the sequences.
        top_k (`int`): Experts per token.

    Returns:
        `dict`: the figures of [`metrics.summarise`]; `dead`, the experts under a twentieth of the fair share; `chance`,
        the [`chance_figures`] of as many tokens; `design_effect`, and `chance_in_text`, those of so many times fewer
        tokens; and `noise`, by figure whether it is no further from balance than the latter. Dead experts are noise
        where so few tokens were counted that chance may leave an expert without any.
    """
    counts_E = halves_HE.sum(0)
    experts = counts_E.numel()
    figures: dict[str, Any] = {name: float(value) for name, value in summarise(counts_E.double()[None]).items()}
    relative_E = relative_load(counts_E.double())
    figures["dead"] = (relative_E < DEAD_THRESHOLD).nonzero().flatten().tolist()
    figures["dead_experts"] = len(figures["dead"])
    tokens = int(counts_E.sum()) / top_k
    figures["design_effect"] = design_effect(halves_HE, top_k)
    figures["chance"] = chance_figures(experts, top_k, tokens)
    figures["chance_in_text"] = chance_figures(experts, top_k, tokens / figures["design_effect"])
    sign = {"normalised_entropy": -1}  # of what is more uneven where it is larger
    figures["noise"] = {
        name: sign.get(name, 1) * figures[name] <= sign.get(name, 1) * figures["chance_in_text"][name]
        for name in FIGURES
    }
    figures["noise"]["dead_experts"] = figures["chance_in_text"]["max_vio"] >= 1.0 - DEAD_THRESHOLD
    return figures


def specialisation_figures(halves_HDE: Tensor, top_k: int) -> dict[str, Any]:
    """
    How much the domains differ in the experts they use.

    The bias is measured where that is larger than [`mutual_information_bias`]: each domain's two halves differ by
    chance only, and by as much as the tokens within a sequence depend on each other. With `I_d`, what the half tells
    about the expert in domain d, the bias is `Σ_d (1 - T_d / T) (T_d / T) I_d`, by the derivation given there.

    Args:
        halves_HDE (`torch.Tensor` of shape `(2, D, E)`):
            How often each expert was chosen in each domain, for two halves of the sequences.
        top_k (`int`): Experts per token.

    Returns:
        `dict`: in bits `plug_in`, its `bias` and `bias_if_independent`, `mutual_information` (plug-in less bias, at least 0)
        and `max_bits`, the entropy of the domains, which it cannot exceed; and `noise`, whether chance explains it
        (two standard deviations of a χ² variable of `(D - 1) (E - 1)` degrees of freedom, to which the plug-in is
        proportional by chance).
    """
    counts_DE = halves_HDE.sum(0)
    plug_in, independent = float(mutual_information(counts_DE)), mutual_information_bias(counts_DE, top_k)
    shares_D = (counts_DE.double().sum(1) / counts_DE.sum().clamp(min=1)).tolist()
    measured = sum(
        (1.0 - share) * share * float(mutual_information(halves_HDE[:, index])) for index, share in enumerate(shares_D)
    )
    bias = max(measured, independent)
    freedom = max((len(counts_DE) - 1) * (counts_DE.shape[1] - 1), 1)
    return {
        "mutual_information": max(plug_in - bias, 0.0),
        "plug_in": plug_in,
        "bias": bias,
        "bias_if_independent": independent,
        "max_bits": -sum(share * math.log2(share) for share in shares_D if share > 0),
        "noise": plug_in <= bias * (1.0 + 2.0 * math.sqrt(2.0 / freedom)),
    }


def lift(counts_DE: Tensor) -> Tensor:
    """Share of each expert in a domain over its share in all, `(D, E)`; 1 where the expert or the domain has nothing."""
    counts_DE = counts_DE.double()
    expected_DE = counts_DE.sum(1, keepdim=True) * counts_DE.sum(0) / counts_DE.sum().clamp(min=1)
    return torch.where(expected_DE > 0, counts_DE / expected_DE.clamp(min=1e-12), 1.0)
