"""What a router class is: where its outputs are, how it scores, and a table of the classes that depart from the rule.

A model class of transformers says in `_can_record_outputs["router_logits"]` which module is its router and where in
the return value the logits are. Nearly all routers then share one contract,

    forward(hidden_states) -> (router_logits (T, E), topk_weights (T, k), topk_indices (T, k))

and the scoring can be read off their source. `TRAITS` lists the classes that depart from that, one line each.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..maths import SCORINGS


# Names under which families keep a bias that is added to the scores for the selection only.
NATIVE_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def _recorded_logits(output, module, args, index: int) -> Tensor:
    return output[index] if isinstance(output, tuple) else output


def _linear_logits(output, module, args, index: int) -> Tensor:
    """Logits of a gate that does not return them: its own linear layer once more, in fp32 as there."""
    hidden = args[0].reshape(-1, args[0].shape[-1])
    return F.linear(hidden.float(), module.weight.float())


@dataclass(frozen=True)
class RouterTraits:
    """
    How one router class departs from the common contract.

    Args:
        scoring (`str` or `Callable[[nn.Module], str]`, *optional*):
            Key of `pricing.SCORINGS`; read off the class's source when `None`.
        carrier (`int`, *optional*, defaults to `1`):
            Position, in the return value, of the differentiable output through which the task gradient flows back;
            `None` if the router returns only its logits.
        selected (`int`, *optional*, defaults to `2`):
            Position of the chosen experts; `None` if they are not returned, then the top-k of the scores is taken.
        ranks (`str`, *optional*, defaults to `"logits"`):
            What the top-k of a router that does not return its choice ranks: `"logits"` or `"probs"`.
        biases (`str`, *optional*, defaults to `"scores"`):
            What the family's own selection bias is added to: `"scores"` or `"logits"`.
        selects_in_parent (`bool`, *optional*, defaults to `False`):
            Whether the selecting top-k happens in the forward of the parent module.
        experts (`str`, *optional*): attribute holding the width of the logits, where it is not the usual one.
        logits (`Callable`, *optional*): how to obtain the logits from a call.
        no_bias (`str`, *optional*): reason why a selection bias cannot work here.
        refused (`str`, *optional*): reason why the family cannot be balanced at all.
        ignored (`bool`, *optional*): recorded by transformers, but no router of its own.
    """

    scoring: str | Callable[[nn.Module], str] | None = None
    carrier: int | None = 1
    selected: int | None = 2
    ranks: str = "logits"
    biases: str = "scores"
    selects_in_parent: bool = False
    experts: str | None = None
    logits: Callable[..., Tensor] = _recorded_logits
    no_bias: str | None = None
    refused: str | None = None
    ignored: bool = False


def _gate_scoring(module: nn.Module) -> str:
    return str(getattr(module, "scoring_func", "softmax"))


def _selection_fn(module: nn.Module) -> str:
    return str(module.expert_selection_fn)


def _score_activation(module: nn.Module) -> str:
    name = type(module.score_fn).__name__
    return next(key for key in SCORINGS if name.lower().startswith(key))


TRAITS: dict[str, RouterTraits] = {
    "Cohere2MoeTopKRouter": RouterTraits(scoring=_selection_fn),
    "DbrxRouter": RouterTraits(carrier=None, selected=None, ranks="probs", selects_in_parent=True),
    "DogeCDMoE": RouterTraits(
        refused="its product keys score two half-experts, there is no distribution over experts"
    ),
    "Gemma4TextRouter": RouterTraits(scoring="probs"),
    "JetMoeAttention": RouterTraits(ignored=True),  # hands on the logits of the JetMoeTopKGating inside it
    "JetMoeTopKGating": RouterTraits(carrier=2, selected=None),
    "Kolibri1TopKRouter": RouterTraits(biases="logits"),
    "Llama4Router": RouterTraits(carrier=0, selected=None),
    "LongcatFlashTopkRouter": RouterTraits(experts="n_routed_experts"),  # its identity experts are routed to as well
    "PhimoeTopKRouter": RouterTraits(no_bias="sparsemixer samples the experts, there is no top-k to bias"),
    # the last class skips the block; it is returned as expert 0 with weight 0
    "ZayaRouter": RouterTraits(experts="num_router_classes", selected=None, ranks="probs"),
}
# Gates of models that ship their own code, by their contract instead of by a transformers class.
REMOTE_TRAITS: dict[str, RouterTraits] = {
    "MoEGate": RouterTraits(scoring=_gate_scoring, carrier=1, selected=0, logits=_linear_logits),
}


@dataclass(frozen=True)
class RouterKind:
    """A router class together with its traits and the position of the logits in its return value."""

    target: type[nn.Module]
    index: int = 0
    layer_name: str | None = None
    traits: RouterTraits = RouterTraits()

    def scoring_of(self, module: nn.Module) -> str:
        scoring = self.scoring
        return scoring if isinstance(scoring, str) else scoring(module)

    @property
    def scoring(self) -> str | Callable[[nn.Module], str]:
        """Key of `pricing.SCORINGS`, or what reads it off a module where its config decides."""
        return self.traits.scoring or source_scoring(self.target)


@functools.cache
def class_source(module_class: Hashable) -> str:
    return inspect.getsource(cast(Any, module_class))


def source_scoring(router_class: type[nn.Module]) -> str | Callable[[nn.Module], str]:
    """`"sigmoid"` or `"softmax"`, whichever the source of the class applies, or what finds it in a module."""
    source = class_source(cast(Hashable, router_class))
    if "self.score_fn(" in source:
        return _score_activation
    return "sigmoid" if "sigmoid(" in source else "softmax"


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
