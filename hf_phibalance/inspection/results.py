"""
The result of an inspection: counts per layer, domain and expert, and the figures computed from them.

Shapes: H = 2 halves of the sequences, D domains, E experts, T tokens, k experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..maths import DEAD_THRESHOLD, mutual_information, mutual_information_bias, noise_floor, relative_load, summarise


BALANCE = ("max_vio", "gini", "cv", "normalised_entropy")
CONFIDENCE = ("top1_probability", "chosen_probability", "entropy_bits")  # means over tokens
MIN_STANDARD_ERRORS = 3.0  # by which a specialist's share in its domain exceeds its share in the others


@dataclass
class Layer:
    """
    Counts of one router.

    Args:
        name (`str`): Name of the router in `model.named_modules()`.
        top_k (`int`): Experts per token.
        scoring (`str`): How logits become probabilities.
        halves (`torch.Tensor` of shape `(2, D, E)`):
            How often each expert was chosen in each domain. The first half has every other sequence, the second the rest.
        confidence (`torch.Tensor` of shape `(D, 3)`): Sums over tokens of the figures in `CONFIDENCE`.
        choices (`torch.Tensor` of shape `(N, k)`, *optional*):
            The experts of each of the N tokens, one domain after the other, if [`inspect_model`] was asked to keep them.
    """

    name: str
    top_k: int
    scoring: str
    halves: Tensor
    confidence: Tensor
    choices: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """How often each expert was chosen in each domain, `(D, E)`."""
        return self.halves.sum(0)

    @property
    def experts(self) -> int:
        return self.halves.shape[-1]

    def tokens(self) -> Tensor:
        """Returns the number of tokens of each domain, `(D,)`."""
        return self.counts.sum(1) // self.top_k


@dataclass
class Example:
    """
    The experts of the first T tokens of a text, in each of the L layers.

    Args:
        domain (`str`): Name of its domain.
        tokens (`list[str]`): The tokens as text.
        choices (`list[torch.Tensor]`): The experts of each token by falling weight, `(T, k)` for each layer.
        weights (`list[torch.Tensor]`): Their probabilities in the router, divided by the sum of the k, `(T, k)` for each layer.
    """

    domain: str
    tokens: list[str]
    choices: list[Tensor]
    weights: list[Tensor]


@dataclass
class Inspection:
    """
    Expert choices of all routers of a model on some texts.

    Args:
        model (`dict`): Name, type and size of the model.
        settings (`dict`): Sequence length and the other settings of the run.
        domains (`dict[str, dict]`): Tokens, sequences, texts and files read, by domain.
        layers (`list[Layer]`): The routers, in the order of the model.
        notes (`list[str]`): Warnings for readers of the figures.
        examples (`list[Example]`): The first texts of each domain, token by token.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    domains: dict[str, dict[str, Any]]
    layers: list[Layer]
    notes: list[str] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def scopes(self) -> list[str]:
        """Returns the scopes that figures exist for: `"overall"`, then each domain if there are several."""
        return ["overall", *(self.domains if len(self.domains) > 1 else [])]

    def halves(self, layer: Layer, scope: str) -> Tensor:
        """Returns the counts of a layer in one of `scopes` for the two halves of the sequences, `(2, E)`."""
        return layer.halves.sum(1) if scope == "overall" else layer.halves[:, list(self.domains).index(scope)]

    def counts(self, layer: Layer, scope: str) -> Tensor:
        """Returns the counts of a layer in one of `scopes`, `(E,)`."""
        return self.halves(layer, scope).sum(0)

    def loads(self, layer: Layer, scope: str) -> list[float]:
        """Returns the load of each expert of a layer divided by the fair share."""
        return relative_load(self.counts(layer, scope).double()).tolist()

    def layer_figures(self, layer: Layer) -> dict[str, dict[str, Any]]:
        """Returns the figures of a layer by scope: those of [`balance_figures`] and `CONFIDENCE`."""
        return {scope: self._figures(layer, scope) for scope in self.scopes()}

    def _figures(self, layer: Layer, scope: str) -> dict[str, Any]:
        index = slice(None) if scope == "overall" else [list(self.domains).index(scope)]
        means = layer.confidence[index].sum(0) / layer.tokens()[index].sum().clamp(min=1)
        return balance_figures(self.halves(layer, scope), layer.top_k) | dict(zip(CONFIDENCE, means.tolist()))

    def summary(self, scope: str) -> dict[str, Any]:
        """Returns the means over layers of the figures of a scope, the worst MaxVio and the number of dead experts."""
        columns = [self._figures(layer, scope) for layer in self.layers]

        return {
            "tokens": sum(read["tokens"] for name, read in self.domains.items() if scope in ("overall", name)),
            **{name: fmean(column[name] for column in columns) for name in BALANCE},
            "max_vio_worst_layer": max(column["max_vio"] for column in columns),
            "noise_floor": fmean(column["chance"]["max_vio"] for column in columns),
            "noise_floor_in_text": fmean(column["chance_in_text"]["max_vio"] for column in columns),
            "dead_experts": sum(column["dead_experts"] for column in columns),
            **{name: fmean(column[name] for column in columns) for name in CONFIDENCE},
        }

    def preferences(self, layer: Layer, domain: str) -> dict[str, Tensor]:
        """
        Returns how much `domain` prefers each expert of a layer, `(E,)` each: the `share` of its tokens that choose the expert,
        `share_elsewhere` (in the other domains), `lift`, `bits` (the part of the layer's mutual information), and
        `standard_errors` by which `share` exceeds `share_elsewhere` ([`design_effect`] included).
        """
        index = list(self.domains).index(domain)
        counts_DE, tokens_D = layer.counts.double(), layer.tokens().double()
        here, elsewhere = tokens_D[index], tokens_D.sum() - tokens_D[index]
        share_E = counts_DE[index] / here
        other_E = (counts_DE.sum(0) - counts_DE[index]) / elsewhere
        pooled_E = counts_DE.sum(0) / tokens_D.sum()
        effect = design_effect(layer.halves[:, index], layer.top_k)
        error_E = (effect * pooled_E * (1 - pooled_E) * (1 / here + 1 / elsewhere)).clamp(min=1e-300).sqrt()
        lift_E = lift(counts_DE)[index]
        return {
            "share": share_E,
            "share_elsewhere": other_E,
            "lift": lift_E,
            "bits": counts_DE[index] / counts_DE.sum() * lift_E.clamp(min=1e-300).log2(),
            "standard_errors": (share_E - other_E) / error_E,
        }

    def specialists(self, domain: str, top: int = 10) -> list[dict[str, Any]]:
        """
        Returns the experts that `domain` uses more than the other domains do, by three standard errors, ranked by `bits`.

        Args:
            domain (`str`): Name of a domain.
            top (`int`, *optional*, defaults to `10`): Longest list to return.

        Returns:
            `list[dict]`: `layer`, `expert`, and `share`, `share_elsewhere`, `lift` and `bits` as in [`preferences`].
        """
        found = []
        for layer in self.layers:
            columns = self.preferences(layer, domain)
            for expert in (columns.pop("standard_errors") > MIN_STANDARD_ERRORS).nonzero().flatten().tolist():
                values = {name: float(column_E[expert]) for name, column_E in columns.items()}
                found.append({"layer": layer.name, "expert": expert, **values})
        return sorted(found, key=lambda entry: -entry["bits"])[:top]

    def to_dict(self, top: int = 10) -> dict[str, Any]:
        """Returns all figures as plain numbers and words, for JSON, with at most `top` specialists of each domain."""
        several = len(self.domains) > 1
        return {
            "model": self.model,
            "settings": self.settings,
            "domains": self.domains,
            "summary": {scope: self.summary(scope) for scope in self.scopes()},
            "layers": [
                {
                    "name": layer.name,
                    "experts": layer.experts,
                    "top_k": layer.top_k,
                    "scoring": layer.scoring,
                    "counts": {scope: self.counts(layer, scope).tolist() for scope in self.scopes()},
                    "figures": self.layer_figures(layer),
                    "specialisation": specialisation_figures(layer.halves, layer.top_k) if several else None,
                }
                for layer in self.layers
            ],
            "specialists": {name: self.specialists(name, top) for name in self.domains} if several else {},
            "notes": self.notes,
        }


def chance_figures(num_experts: int, top_k: int, tokens: float) -> dict[str, float]:
    """
    Returns the figures in `BALANCE` that chance alone gives if every token picks `top_k` experts uniformly.

    The relative variance of an expert's count is then `v = (E - k) / (T k)`. CV is `sqrt(v)`. Gini is half the mean absolute
    difference of two Gaussian counts with a constant sum, `sqrt(v (E - 1) / (E π))`. The entropy is `v / (2 log E)` below its
    maximum. MaxVio is [`noise_floor`]. Tokens of a text are correlated, so real texts have more noise.
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
    Returns how many tokens of the text carry as much information as one independent token, at least 1.

    Tokens of a sequence resemble each other, so counts vary more than those of independent tokens. To measure this, two halves
    of the sequences `halves_HE (2, E)` are compared: the mutual information of half and expert is divided by its value for
    independent tokens ([`mutual_information_bias`]). Resemblance between sequences is not measured.
    """
    independent = mutual_information_bias(halves_HE, top_k)
    return max(1.0, float(mutual_information(halves_HE)) / independent) if independent > 0 else 1.0


def balance_figures(halves_HE: Tensor, top_k: int) -> dict[str, Any]:
    """
    Returns how evenly experts are chosen, from the counts of two halves of the sequences `halves_HE (2, E)`.

    Returns:
        `dict`: the figures of [`summarise`], and
            - `dead`: the experts with less than a twentieth of the fair share, and `dead_experts`, their number;
            - `chance`: [`chance_figures`] of as many independent tokens;
            - `design_effect`, and `chance_in_text`: [`chance_figures`] of the tokens divided by it;
            - `noise`: for each figure, whether `chance_in_text` is at least as far from balance. Dead experts are
              noise if chance alone may leave an expert without tokens.
    """
    counts_E = halves_HE.sum(0)
    experts, tokens = counts_E.numel(), int(counts_E.sum()) / top_k
    effect = design_effect(halves_HE, top_k)
    chance = chance_figures(experts, top_k, tokens / effect)
    figures: dict[str, Any] = {name: float(value) for name, value in summarise(counts_E.double()[None]).items()}
    dead = (relative_load(counts_E.double()) < DEAD_THRESHOLD).nonzero().flatten().tolist()
    noise = {name: figures[name] <= chance[name] for name in BALANCE}
    noise["normalised_entropy"] = figures["normalised_entropy"] >= chance["normalised_entropy"]  # 1 is balance
    noise["dead_experts"] = chance["max_vio"] >= 1.0 - DEAD_THRESHOLD
    return {
        **figures,
        "dead": dead,
        "dead_experts": len(dead),
        "design_effect": effect,
        "chance": chance_figures(experts, top_k, tokens),
        "chance_in_text": chance,
        "noise": noise,
    }


def specialisation_figures(halves_HDE: Tensor, top_k: int) -> dict[str, Any]:
    """
    Returns how much the domains differ in the experts they use, from `halves_HDE (2, D, E)`.

    Chance alone makes the plug-in estimate of the mutual information positive. This bias is the larger of two: that of
    independent tokens ([`mutual_information_bias`]), and `Σ_d (1 - T_d / T) (T_d / T) I_d`. There `I_d` is the mutual information
    of half and expert in domain d, which also contains the dependence of tokens within a sequence.

    Returns:
        `dict`: in bits, `plug_in`, `bias`, `bias_if_independent`, `mutual_information` (plug-in less bias, at least 0) and
        `max_bits` (the entropy of the domains, an upper bound). `noise` is whether chance explains the plug-in: it is within two
        standard deviations of a χ² variable with `(D - 1) (E - 1)` degrees of freedom.
    """
    counts_DE = halves_HDE.sum(0)
    plug_in, independent = float(mutual_information(counts_DE)), mutual_information_bias(counts_DE, top_k)
    shares = (counts_DE.double().sum(1) / counts_DE.sum().clamp(min=1)).tolist()
    between_halves = [float(mutual_information(halves_HDE[:, domain])) for domain in range(len(shares))]
    measured = sum((1.0 - share) * share * bits for share, bits in zip(shares, between_halves))
    bias = max(measured, independent)
    freedom = max((len(counts_DE) - 1) * (counts_DE.shape[1] - 1), 1)
    return {
        "mutual_information": max(plug_in - bias, 0.0),
        "plug_in": plug_in,
        "bias": bias,
        "bias_if_independent": independent,
        "max_bits": -sum(share * math.log2(share) for share in shares if share > 0),
        "noise": plug_in <= bias * (1.0 + 2.0 * math.sqrt(2.0 / freedom)),
    }


def lift(counts_DE: Tensor) -> Tensor:
    """Returns the share of each expert in a domain over its share in all, `(D, E)`; 1 where the expert or domain has no count."""
    counts_DE = counts_DE.double()
    expected_DE = counts_DE.sum(1, keepdim=True) * counts_DE.sum(0) / counts_DE.sum().clamp(min=1)
    return torch.where(expected_DE > 0, counts_DE / expected_DE.clamp(min=1e-12), 1.0)
