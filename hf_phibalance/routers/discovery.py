"""Where the routers are: found through what transformers itself declares, with a table only for what differs.

A model class of transformers says in `_can_record_outputs["router_logits"]` which module is its router and where in
the return value the logits are. Nearly all routers then share one contract,

    forward(hidden_states) -> (router_logits (T, E), topk_weights (T, k), topk_indices (T, k))

and the scoring can be read off their source. `TRAITS` lists the classes that depart from that, one line each.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..maths.pricing import SCORINGS


WRAPPER_PARTS = re.compile(
    r"\.(base_layer|original_module|modules_to_save\.[^.]+|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\b"
)
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


@dataclass
class RouterSite:
    """One router of a model: its name, the module(s) that compute it, and how to read their outputs."""

    name: str
    kind: RouterKind
    num_experts: int
    top_k: int
    scoring: str
    modules: list[nn.Module] = field(default_factory=list)  # several where PEFT keeps a trainable copy
    parent: nn.Module | None = None
    native_bias: list[tuple[nn.Module, str]] = field(default_factory=list)
    charged: bool = False  # whether a price gradient has gone through it
    softmax_carries: bool | None = None  # whether the task gradient goes back through its softmax, once seen
    score_width: float | None = None  # the span of the scores that it ranks, once seen and where something needs it

    def write_native_bias(self, bias: Tensor) -> None:
        """Copies `bias (E,)` into the family's own selection bias, in place."""
        for owner, name in self.native_bias:
            target = getattr(owner, name).data
            target.copy_(bias.view(target.shape))

    def read_native_bias(self) -> Tensor | None:
        """The family's own selection bias `(E,)`; `None` if it has none, or while accelerate has offloaded it."""
        bias = getattr(*self.native_bias[0]).detach().reshape(-1) if self.native_bias else None
        return None if bias is None or bias.is_meta else bias


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


def canonical_name(name: str) -> str:
    """`name` of a module without what PEFT, DDP, FSDP, `torch.compile` and checkpoint wrappers put in."""
    return WRAPPER_PARTS.sub("", f".{name}").lstrip(".")


def find_routers(root: nn.Module) -> list[RouterSite]:
    """
    The routers inside `root`, in the order of its modules.

    Raises:
        ValueError: if there is none, or if the family is one that cannot be balanced.
    """
    sites: dict[str, RouterSite] = {}
    parents = {id(child): module for _, module in root.named_modules() for child in module.children()}
    for name, module, kind in _matches(root):
        if kind.traits.refused:
            raise ValueError(
                f"{type(root).__name__} cannot be φ-balanced: {kind.traits.refused} ({kind.target.__name__})."
            )
        canonical = canonical_name(name)
        parent = parents.get(id(module))
        while parent is not None and canonical_name(_name_of(root, parent)) == canonical:
            parent = parents.get(id(parent))  # step over wrappers of the router itself
        site = sites.get(canonical)
        if site is None:
            site = sites[canonical] = RouterSite(
                canonical,
                kind,
                _num_experts(module, kind.traits),
                _top_k(module, parent),
                kind.scoring_of(module),
                parent=parent,
            )
        site.modules.append(module)
        bias = _native_bias(module, parent, site.num_experts)
        if bias is not None and not any(owner is bias[0] for owner, _ in site.native_bias):
            site.native_bias.append(bias)
    if not sites:
        raise ValueError(
            f"{type(root).__name__} has no router that transformers declares (`_can_record_outputs['router_logits']`), "
            "so there is nothing to balance. `hf_phibalance.supported_families()` lists the model types that have."
        )
    return list(sites.values())


def _matches(root: nn.Module) -> Iterator[tuple[str, nn.Module, RouterKind]]:
    """Modules of `root` that are routers by a declaration of any transformers model class inside `root`."""
    kinds = {
        (kind.target, kind.layer_name): kind for module in root.modules() for kind in declared_kinds(type(module))
    }
    for name, module in root.named_modules():
        for kind in kinds.values():
            layer_name_fits = kind.layer_name is None or f".{kind.layer_name}." in f".{canonical_name(name)}."
            if isinstance(module, kind.target) and layer_name_fits and not kind.traits.ignored:
                yield name, module, kind
                break
        else:
            traits = REMOTE_TRAITS.get(type(module).__name__)
            if traits is not None and all(hasattr(module, a) for a in ("weight", "top_k", "n_routed_experts")):
                yield name, module, RouterKind(type(module), traits=traits)


def _name_of(root: nn.Module, wanted: nn.Module) -> str:
    return next((name for name, module in root.named_modules() if module is wanted), "")


def _num_experts(router: nn.Module, traits: RouterTraits) -> int:
    for name in (traits.experts or "num_experts", "n_routed_experts", "num_local_experts"):
        if isinstance(getattr(router, name, None), int):
            return getattr(router, name)
    weights = [p for name, p in router.named_parameters() if p.ndim == 2 and ".lora_" not in name]
    if len(weights) != 1:
        raise ValueError(f"{type(router).__name__}: cannot tell the number of experts; add it to routers.TRAITS.")
    return weights[0].shape[0]


def _top_k(router: nn.Module, parent: nn.Module | None) -> int:
    for module in (router, parent):
        for name in ("top_k", "num_experts_per_tok", "moe_top_k"):
            if isinstance(getattr(module, name, None), int):
                return getattr(module, name)
    config: Any = getattr(router, "config", None)
    return int(getattr(config, "top_k_experts", 0) or getattr(config, "num_experts_per_tok", 1))


def _native_bias(router: nn.Module, parent: nn.Module | None, num_experts: int) -> tuple[nn.Module, str] | None:
    """Owner and name of the family's own selection bias, looked for in the router, inside it, and in its block."""
    owners = [*router.modules(), *([parent] if parent is not None else [])]
    for owner in owners:
        for name in NATIVE_BIAS_NAMES:
            tensor = getattr(owner, name, None)
            if isinstance(tensor, Tensor) and tensor.numel() == num_experts:
                return owner, name
    return None


@dataclass(frozen=True)
class Family:
    """What is known about one causal-LM model type without building it; see `supported_families`."""

    model_type: str
    router: str
    scoring: str
    selection_bias: str
    refused: str | None = None


def supported_families() -> dict[str, Family]:
    """
    Every causal-LM model type of the installed transformers whose model class declares router logits.

    Returns:
        `dict[str, Family]`: by model type, the refused ones included (with `refused` saying why).
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    families = {}
    for model_type, class_name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        model_class = getattr(transformers, class_name if isinstance(class_name, str) else class_name[0], None)
        if model_class is None:
            continue
        module = sys.modules[model_class.__module__]
        kinds = {
            kind.target: kind
            for member in vars(module).values()
            if isinstance(member, type) and member.__module__ == module.__name__
            for kind in declared_kinds(member)
            if not kind.traits.ignored
        }
        if kinds:
            families[model_type] = _family(model_type, next(iter(kinds.values())), inspect.getsource(module))
    return families


def _family(model_type: str, kind: RouterKind, model_source: str) -> Family:
    has_native = any(f"self.{name} = " in model_source for name in NATIVE_BIAS_NAMES)
    bias = f"none: {kind.traits.no_bias}" if kind.traits.no_bias else "native" if has_native else "re-selected"
    return Family(
        model_type,
        kind.target.__name__,
        kind.scoring if isinstance(kind.scoring, str) else "by config",
        bias,
        kind.traits.refused,
    )
