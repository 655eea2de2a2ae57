"""What the routers of a model did with some texts: counts per layer, domain and expert, and every figure of them.

Shapes: H = 2 halves of the sequences, D domains, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .figures import FIGURES, balance_figures, design_effect, lift, specialisation_figures


CONFIDENCE = ("top1_probability", "chosen_probability", "entropy_bits")  # means over tokens
MIN_STANDARD_ERRORS = 3.0  # by which the share of an expert in a domain has to differ from that in the others


@dataclass
class Layer:
    """
    What one router did.

    Args:
        name (`str`): Its name, as in `model.named_modules()`.
        top_k (`int`): Experts per token.
        scoring (`str`): How its logits become probabilities.
        halves (`torch.Tensor` of shape `(2, D, E)`):
            How often each expert was chosen in each domain, whole numbers, for every other sequence and for the rest.
        confidence (`torch.Tensor` of shape `(D, 3)`): Sums over tokens of what `CONFIDENCE` names.
    """

    name: str
    top_k: int
    scoring: str
    halves: Tensor
    confidence: Tensor

    @property
    def counts(self) -> Tensor:
        """How often each expert was chosen in each domain, `(D, E)`."""
        return self.halves.sum(0)

    @property
    def experts(self) -> int:
        return self.halves.shape[-1]

    def tokens(self) -> Tensor:
        """Tokens of each domain, `(D,)`."""
        return self.counts.sum(1) // self.top_k


@dataclass
class Inspection:
    """
    What the routers of a model did with some texts.

    Args:
        model (`dict`): What is known of the model.
        settings (`dict`): How it was looked into.
        domains (`dict[str, dict]`): By name, what was read.
        layers (`list[Layer]`): The routers, in the order of the model.
        notes (`list[str]`): What a reader of the figures has to know.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    domains: dict[str, dict[str, Any]]
    layers: list[Layer]
    notes: list[str] = field(default_factory=list)

    def scopes(self) -> list[str]:
        """Names of what figures are given for: all texts, then each domain if there are several."""
        return ["overall", *(self.domains if len(self.domains) > 1 else [])]

    def halves(self, layer: Layer, scope: str) -> Tensor:
        """Counts `(2, E)` of a layer in one of `scopes`, for the two halves of the sequences."""
        return layer.halves.sum(1) if scope == "overall" else layer.halves[:, list(self.domains).index(scope)]

    def counts(self, layer: Layer, scope: str) -> Tensor:
        """Counts `(E,)` of a layer in one of `scopes`."""
        return self.halves(layer, scope).sum(0)

    def confidence(self, layer: Layer, scope: str) -> dict[str, float]:
        """Means over the tokens of one of `scopes`, by the names of `CONFIDENCE`."""
        index = slice(None) if scope == "overall" else [list(self.domains).index(scope)]
        means = layer.confidence[index].sum(0) / layer.tokens()[index].sum().clamp(min=1)
        return dict(zip(CONFIDENCE, means.tolist()))

    def specialists(self, domain: str, top: int = 10) -> list[dict[str, Any]]:
        """
        The experts that `domain` uses most beyond what the other domains do.

        They are ranked by what they contribute to the mutual information of their layer; a share that differs from
        that of the other domains by fewer than three standard errors ([`design_effect`] included) is left out.

        Args:
            domain (`str`): Name of a domain.
            top (`int`, *optional*, defaults to `10`): At most so many.

        Returns:
            `list[dict]`: with `layer`, `expert`, `share` and `share_elsewhere` (of the tokens that choose it), `lift` and
            `bits`.
        """
        index, found = list(self.domains).index(domain), []
        for layer in self.layers:
            counts_DE, tokens_D = layer.counts.double(), layer.tokens().double()
            here, elsewhere = tokens_D[index], tokens_D.sum() - tokens_D[index]
            if not (here and elsewhere):
                continue
            share_E = counts_DE[index] / here
            other_E = (counts_DE.sum(0) - counts_DE[index]) / elsewhere
            pooled_E = counts_DE.sum(0) / tokens_D.sum()
            worth = design_effect(layer.halves[:, index], layer.top_k)
            error_E = (worth * pooled_E * (1 - pooled_E) * (1 / here + 1 / elsewhere)).clamp(min=1e-300).sqrt()
            lift_E = lift(counts_DE)[index]
            bits_E = counts_DE[index] / counts_DE.sum() * lift_E.clamp(min=1e-300).log2()
            for expert in ((share_E - other_E) / error_E > MIN_STANDARD_ERRORS).nonzero().flatten().tolist():
                found.append(
                    {
                        "layer": layer.name,
                        "expert": expert,
                        "share": float(share_E[expert]),
                        "share_elsewhere": float(other_E[expert]),
                        "lift": float(lift_E[expert]),
                        "bits": float(bits_E[expert]),
                    }
                )
        return sorted(found, key=lambda entry: -entry["bits"])[:top]

    def layer_figures(self, layer: Layer) -> dict[str, Any]:
        """All figures of a layer, by name of the scope."""
        return {
            scope: {
                **balance_figures(self.halves(layer, scope), layer.top_k),
                **self.confidence(layer, scope),
            }
            for scope in self.scopes()
        }

    def summary(self, scope: str) -> dict[str, float]:
        """Means over the layers of the figures of one of `scopes`, the worst MaxVio and the number of dead experts."""
        columns = [balance_figures(self.halves(layer, scope), layer.top_k) for layer in self.layers]
        confidences = [self.confidence(layer, scope) for layer in self.layers]
        mean = {name: sum(column[name] for column in columns) / len(columns) for name in FIGURES}
        return {
            "tokens": sum(read["tokens"] for name, read in self.domains.items() if scope in ("overall", name)),
            **mean,
            "max_vio_worst_layer": max(column["max_vio"] for column in columns),
            "noise_floor": sum(column["chance"]["max_vio"] for column in columns) / len(columns),
            "noise_floor_in_text": sum(column["chance_in_text"]["max_vio"] for column in columns) / len(columns),
            "dead_experts": sum(column["dead_experts"] for column in columns),
            **{name: sum(c[name] for c in confidences) / len(confidences) for name in CONFIDENCE},
        }

    def to_dict(self, top: int = 10) -> dict[str, Any]:
        """
        Everything as plain numbers and words, for JSON.

        Args:
            top (`int`, *optional*, defaults to `10`): Specialists of each domain.
        """
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
