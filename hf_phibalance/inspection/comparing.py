"""
How two models choose experts for the same tokens, for example a model before and after fine-tuning.

Shapes: D domains, E experts, N tokens, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..files import layer_labels, quoted
from .results import MIN_STANDARD_ERRORS, Inspection, Layer


IN_BOTH = ("max_vio", "gini", "dead_experts", "top1_probability")  # figures that are given for both models
AT_ONCE = 1 << 16  # tokens


@dataclass
class Comparison:
    """
    Two inspections of the same texts.

    Args:
        before (`Inspection`): Of the first model, made by [`inspect_model`] with `keep_choices=True`.
        after (`Inspection`): Of the second model, made in the same way.

    Raises:
        ValueError: If the routers of the models do not match, if the models read different tokens, or if choices were not kept.
    """

    before: Inspection
    after: Inspection

    def __post_init__(self) -> None:
        pair = (self.before, self.after)
        names = " and ".join(quoted(inspection.model["name"]) for inspection in pair)
        if len({_routers(inspection) for inspection in pair}) > 1:
            sizes = " and ".join(_sizes(inspection) for inspection in pair)
            raise ValueError(
                f"the routers of {names} do not match, they have {sizes}: compare a model with a fine-tuned version of it."
            )
        if self.before.domains != self.after.domains or self.before.settings != self.after.settings:
            raise ValueError(
                f"{names} did not read the same tokens: inspect both with the same texts, tokenizer and settings."
            )
        if any(layer.choices is None for inspection in pair for layer in inspection.layers):
            raise ValueError(f"the choices of {names} were not kept: use inspect_model(..., keep_choices=True).")

    @cached_property
    def common(self) -> list[Tensor]:
        """For each layer, how often both models chose an expert for the same token, `(D, E)`."""
        sizes = [read["tokens"] for read in self.before.domains.values()]
        return [_common(*pair, sizes) for pair in zip(self.before.layers, self.after.layers)]

    @cached_property
    def layer_figures(self) -> list[dict[str, dict[str, Any]]]:
        """
        For each layer, by scope:
            - `differ`: the share of choices that the other model does not make for the same token;
            - `differ_if_unrelated`: the share to expect if both models chose with their loads, but without regard to the token;
            - `load_moved`: the share of choices by which the loads differ, Σ_e |after_e - before_e| / 2;
            - `load_moved_by_chance`: the same, of what moves in one half of the sequences but not in the other;
            - `noise`: whether chance explains `load_moved`: its ratio to the latter is within two standard deviations.
        """
        found = []
        for was, now, common_DE in zip(self.before.layers, self.after.layers, self.common):
            found.append({scope: self._figures(was, now, common_DE, scope) for scope in self.before.scopes()})
        return found

    def _figures(self, was: Layer, now: Layer, common_DE: Tensor, scope: str) -> dict[str, Any]:
        index = slice(None) if scope == "overall" else [list(self.before.domains).index(scope)]
        was_HE, now_HE = self.before.halves(was, scope).double(), self.after.halves(now, scope).double()
        chosen, net_HE = was_HE.sum(), now_HE - was_HE
        unrelated = (was_HE.sum(0) * now_HE.sum(0)).sum() * was.top_k / chosen**2
        moved, chance = (float(net_E.abs().sum() / chosen / 2) for net_E in (net_HE.sum(0), net_HE[0] - net_HE[1]))
        spread = math.sqrt((math.pi - 2) / max(was.experts - 1, 1))  # of the logarithm of the ratio of two such sums
        return {
            "differ": float(1 - common_DE[index].sum() / chosen),
            "differ_if_unrelated": float(1 - unrelated),
            "load_moved": moved,
            "load_moved_by_chance": chance,
            "noise": {"load_moved": moved <= chance * math.exp(2 * spread)},
        }

    def summary(self, scope: str) -> dict[str, Any]:
        """Returns the means over layers of the figures of a scope, and those of both models in `IN_BOTH`."""
        columns = [figures[scope] for figures in self.layer_figures]
        names = [name for name in columns[0] if name != "noise"]
        both = {"before": self.before.summary(scope), "after": self.after.summary(scope)}
        return {
            "tokens": both["before"]["tokens"],
            **{name: sum(column[name] for column in columns) / len(columns) for name in names},
            **{when: {name: figures[name] for name in IN_BOTH} for when, figures in both.items()},
        }

    def specialists(self, domain: str, top: int = 10) -> dict[str, Any]:
        """
        Returns what became of the experts that `domain` uses more than the other domains do, see [`Inspection.specialists`].

        Args:
            domain (`str`): Name of a domain.
            top (`int`, *optional*, defaults to `10`): Longest list of the experts of the first model, and of new ones.

        Returns:
            `dict`: `before`, the number of specialists of the first model; `still`, how many of them the second model has too; `new`,
            how many others it has; and `experts`, a list of `dict`: `layer`, `expert`, `is_new`, `before` and `after` (as in
            [`Inspection.preferences`]; `noise` is whether chance explains the preference), and `change` (of `share` less
            `share_elsewhere`), with `noise`, whether chance explains it: tokens would change sides as often in either direction.
        """
        index, found = list(self.before.domains).index(domain), []
        for was, now, common_DE in zip(self.before.layers, self.after.layers, self.common):
            sides = [self.before.preferences(was, domain), self.after.preferences(now, domain)]
            is_special_2E = torch.stack([side.pop("standard_errors") for side in sides]) > MIN_STANDARD_ERRORS
            change_E = (
                sides[1]["share"] - sides[0]["share"] - sides[1]["share_elsewhere"] + sides[0]["share_elsewhere"]
            )
            error_E = _error(was, now, common_DE, index)
            noise_E = change_E.abs() <= MIN_STANDARD_ERRORS * error_E
            for expert in is_special_2E.any(0).nonzero().flatten().tolist():
                is_special = is_special_2E[:, expert].tolist()
                values = [
                    {name: float(column_E[expert]) for name, column_E in side.items()} | {"noise": not special}
                    for side, special in zip(sides, is_special)
                ]
                entry: dict[str, Any] = {"layer": was.name, "expert": expert, "is_new": not is_special[0]}
                entry |= {"before": values[0], "after": values[1]}
                found.append({**entry, "change": float(change_E[expert]), "noise": bool(noise_E[expert])})
        old = sorted((e for e in found if not e["is_new"]), key=lambda entry: -entry["before"]["bits"])
        new = sorted((e for e in found if e["is_new"]), key=lambda entry: -entry["after"]["bits"])
        still = sum(not entry["after"]["noise"] for entry in old)
        return {"before": len(old), "still": still, "new": len(new), "experts": [*old[:top], *new[:top]]}

    def to_dict(self, top: int = 10) -> dict[str, Any]:
        """Returns all figures as plain numbers and words, for JSON, with those of both inspections."""
        scopes = self.before.scopes()
        return {
            "before": self.before.to_dict(top),
            "after": self.after.to_dict(top),
            "summary": {scope: self.summary(scope) for scope in scopes},
            "layers": [
                {"name": layer.name, "figures": figures}
                for layer, figures in zip(self.before.layers, self.layer_figures)
            ],
            "specialists": {name: self.specialists(name, top) for name in self.before.domains}
            if len(scopes) > 1
            else {},
        }


def _routers(inspection: Inspection) -> tuple[tuple[str, int, int], ...]:
    labels = layer_labels([layer.name for layer in inspection.layers])
    return tuple((label, layer.experts, layer.top_k) for label, layer in zip(labels, inspection.layers))


def _sizes(inspection: Inspection) -> str:
    """Returns the routers of a model in words."""
    routers = _routers(inspection)
    experts, top_k = (" or ".join(map(str, sorted(set(sizes)))) for sizes in list(zip(*routers))[1:])
    return f"{len(routers)} routers of {experts} experts, top-{top_k} ({routers[0][0]} to {routers[-1][0]})"


def _error(was: Layer, now: Layer, common_DE: Tensor, index: int) -> Tensor:
    """
    Returns the standard error `(E,)` of the change of `share` less `share_elsewhere` in domain number `index`, if choices change in
    either direction alike. The variance of a count is then the number of choices that only one model makes, times a design effect:
    how much more the two halves of the sequences differ in their changes than such independent choices would.
    """
    swapped_DE = (was.counts + now.counts - 2 * common_DE).double()
    between_DE = (now.halves - was.halves).diff(dim=0)[0].double()
    is_here_D = torch.arange(len(swapped_DE)) == index
    variance_E = torch.zeros(was.experts, dtype=torch.float64)
    for chosen_D in (is_here_D, ~is_here_D):
        swapped_E, between_E = swapped_DE[chosen_D].sum(0), between_DE[chosen_D].sum(0)
        effect = max(1.0, float(between_E.square().sum() / swapped_E.sum().clamp(min=1)))
        variance_E += effect * swapped_E / was.tokens()[chosen_D].sum() ** 2
    return variance_E.sqrt()


def _common(was: Layer, now: Layer, sizes: Sequence[int]) -> Tensor:
    """Returns how often both models chose an expert for the same token, `(D, E)`. `sizes` are the tokens of each domain."""
    assert was.choices is not None and now.choices is not None
    common_DE = torch.zeros(len(sizes), was.experts, dtype=torch.int64)
    for common_E, was_Nk, now_Nk in zip(common_DE, was.choices.split(sizes), now.choices.split(sizes)):
        for one_Nk, other_Nk in zip(was_Nk.split(AT_ONCE), now_Nk.split(AT_ONCE)):
            is_in_both_Nk = (one_Nk.unsqueeze(-1) == other_Nk.unsqueeze(-2)).any(-1)
            common_E += torch.bincount(one_Nk[is_in_both_Nk].long(), minlength=was.experts)
    return common_DE
