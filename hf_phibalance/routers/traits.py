"""What a router class is: how it scores, and a table of the classes that depart from the rule.

A model class of transformers says in `_can_record_outputs["router_logits"]` which module is its router. Where a version
does not, its contract does ([`contract`]). What is what among a router's outputs is told by type and shape
([`RouterSite.read`]), and the scoring is read off the source. `TRAITS` lists the classes for which that does not do, one
line each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import cast

from torch import nn

from ..maths import SCORINGS
from .sources import code_of, returned_values, scoring_in


# Names under which families keep a bias that is added to the scores for the selection only.
NATIVE_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


@dataclass(frozen=True)
class RouterTraits:
    """
    How one router class departs from the common contract.

    Args:
        scoring (`str` or `Callable[[nn.Module], str]`, *optional*):
            Key of `pricing.SCORINGS`; read off the class's source when `None`.
        returns_choice (`bool`, *optional*, defaults to `True`):
            Whether the indices that it returns are its choice; else the top-k of the scores is taken.
        ranks (`str`, *optional*, defaults to `"logits"`):
            What the top-k of a router that does not return its choice ranks: `"logits"` or `"probs"`.
        biases (`str`, *optional*, defaults to `"scores"`):
            What the family's own selection bias is added to: `"scores"` or `"logits"`.
        experts (`str`, *optional*): attribute holding the width of the logits, where it is not the usual one.
        parted_by (`str`, *optional*):
            Where a layer has one router for images and one for the rest: the argument of the model that is not 0 for tokens
            of images.
        no_bias (`str`, *optional*): reason why a selection bias cannot work here.
        refused (`str`, *optional*): reason why the family cannot be balanced at all.
    """

    scoring: str | Callable[[nn.Module], str] | None = None
    returns_choice: bool = True
    ranks: str = "logits"
    biases: str = "scores"
    experts: str | None = None
    parted_by: str | None = None
    no_bias: str | None = None
    refused: str | None = None


def _gate_scoring(module: nn.Module) -> str:
    return str(getattr(module, "scoring_func", "softmax"))


def _selection_fn(module: nn.Module) -> str:
    return str(module.expert_selection_fn)


def _score_activation(module: nn.Module) -> str:
    name = type(module.score_fn).__name__
    return next(key for key in SCORINGS if name.lower().startswith(key))


TRAITS: dict[str, RouterTraits] = {
    "Cohere2MoeTopKRouter": RouterTraits(scoring=_selection_fn),
    "DiffusionGemmaTextRouter": RouterTraits(
        refused="its encoder and its decoder route different tokens through the same weights, which would need two means"
    ),
    "DogeCDMoE": RouterTraits(
        refused="its product keys score two half-experts, there is no distribution over experts"
    ),
    "Ernie4_5_VLMoeMoeTopKRouter": RouterTraits(parted_by="moe_mm_token_type_ids"),
    "Ernie4_5_VL_MoeMoeTopKRouter": RouterTraits(parted_by="moe_mm_token_type_ids"),  # before transformers 5.6
    "Kolibri1TopKRouter": RouterTraits(biases="logits"),
    "LongcatFlashTopkRouter": RouterTraits(experts="n_routed_experts"),  # its identity experts are routed to as well
    "PhimoeTopKRouter": RouterTraits(no_bias="sparsemixer samples the experts, there is no top-k to bias"),
    # the last class skips the block; it is returned as expert 0 with weight 0
    "ZayaRouter": RouterTraits(experts="num_router_classes", returns_choice=False, ranks="probs"),
}
# Gates of models that ship their own code, by their contract instead of by a transformers class.
REMOTE_TRAITS: dict[str, RouterTraits] = {
    "MoEGate": RouterTraits(scoring=_gate_scoring),
}


@dataclass(frozen=True)
class RouterKind:
    """A router class together with its traits and the position of the logits in its return value."""

    target: type[nn.Module]
    index: int = 0
    layer_name: str | None = None
    traits: RouterTraits = RouterTraits()
    block: type[nn.Module] | None = None  # whose code chooses the experts, where the router's does not

    def scoring_of(self, module: nn.Module) -> str:
        scoring = self.scoring
        return scoring if isinstance(scoring, str) else scoring(module)

    @property
    def scoring(self) -> str | Callable[[nn.Module], str]:
        """Key of `pricing.SCORINGS`, or what reads it off a module where its config decides."""
        return self.traits.scoring or source_scoring(self)


def source_scoring(kind: RouterKind) -> str | Callable[[nn.Module], str]:
    """Whichever scoring the source of the class that chooses applies, or what finds it in a module."""
    source = code_of(cast(Hashable, kind.block or kind.target))
    if "self.score_fn(" in source:
        return _score_activation
    scoring = scoring_in(source)
    returned = returned_values(cast(Hashable, kind.target))[kind.index : kind.index + 1]
    return "probs" if scoring == "softmax" and returned == ["softmax"] else scoring


def declared_kinds(model_class: type[nn.Module]) -> list[RouterKind]:
    """Router kinds that the transformers class `model_class` declares in `_can_record_outputs`."""
    declared = getattr(model_class, "_can_record_outputs", None)
    specs = declared.get("router_logits") if isinstance(declared, dict) else None
    specs = specs if isinstance(specs, list) else [specs] if specs is not None else []
    kinds = []
    for spec in specs:
        target = getattr(spec, "target_class", spec)
        if isinstance(target, type):
            traits = TRAITS.get(target.__name__, RouterTraits())
            kinds.append(RouterKind(target, getattr(spec, "index", 0), getattr(spec, "layer_name", None), traits))
    return kinds
