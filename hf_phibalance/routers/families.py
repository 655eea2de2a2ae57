"""
Router classes: how each scores its experts, and which model types of transformers have routers.

A transformers model class declares its router in `_can_record_outputs["router_logits"]`. If a version does not,
`discovery` finds the router by its structure. [`RouterSite.read`] tells a router's outputs apart by type and shape.
The scoring is read from the router's source. For a family that this does not cover, add a row to [`TRAITS`].
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import transformers
from torch import nn

from ..maths import SCORINGS


# Names of the families' own selection biases, which are added to the scores for the selection only.
NATIVE_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


@dataclass(frozen=True)
class RouterTraits:
    """How a router class differs from the others."""

    scoring: str | Callable[[nn.Module], str] | None = None  # key of SCORINGS; by default read from the source
    returns_choice: bool = True  # whether it returns the selected experts; if not, we take the top-k of its scores
    ranks: str = "logits"  # what a router that does not return its selection ranks: "logits" or "probs"
    biases: str = "scores"  # what the family's own selection bias is added to: "scores" or "logits"
    experts: str | None = None  # attribute with the number of experts, if it has an unusual name
    # if image tokens have a router of their own: the model's argument that is not 0 for image tokens
    parted_by: str | None = None
    no_bias: str | None = None  # why a selection bias cannot work
    refused: str | None = None  # why the family cannot be balanced


# Named functions, not lambdas, so that models can be pickled.
def _selection_fn(module: nn.Module) -> str:
    return str(module.expert_selection_fn)


def _scoring_func(module: nn.Module) -> str:
    return str(getattr(module, "scoring_func", "softmax"))


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
    "LongcatFlashTopkRouter": RouterTraits(experts="n_routed_experts"),  # includes its identity experts
    "PhimoeTopKRouter": RouterTraits(no_bias="sparsemixer samples the experts, there is no top-k to bias"),
    # its last class skips the block, and is returned as expert 0 with weight 0
    "ZayaRouter": RouterTraits(experts="num_router_classes", returns_choice=False, ranks="probs"),
}
# Gates of models with remote code.
REMOTE_TRAITS: dict[str, RouterTraits] = {"MoEGate": RouterTraits(scoring=_scoring_func)}


@dataclass(frozen=True)
class RouterKind:
    """A router class, its traits, and the position of the logits in its return value."""

    target: type[nn.Module]
    index: int = 0
    layer_name: str | None = None
    traits: RouterTraits = RouterTraits()
    block: type[nn.Module] | None = None  # the class that does the top-k, if the router does not

    def scoring_of(self, module: nn.Module) -> str:
        """Returns the scoring of a router `module` of this kind."""
        scoring = self.scoring
        return scoring if isinstance(scoring, str) else scoring(module)

    @property
    def scoring(self) -> str | Callable[[nn.Module], str]:
        """Key of `SCORINGS`, or a function that reads it from a module if the model's config decides."""
        if self.traits.scoring:
            return self.traits.scoring
        code = code_of(cast(Hashable, self.block or self.target))
        if "self.score_fn(" in code:
            return _score_activation
        if "sigmoid(" in code:
            return "sigmoid"
        returned = returned_values(cast(Hashable, self.target))[self.index : self.index + 1]
        return "probs" if returned == ["softmax"] else "softmax"


def declared_kinds(model_class: type[nn.Module]) -> list[RouterKind]:
    """Returns the routers that the transformers class `model_class` declares in `_can_record_outputs`."""
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


# ---------------------------------------------------------------------- sources


@functools.cache
def class_source(module_class: Hashable) -> str:
    return inspect.getsource(cast(Any, module_class))


@functools.cache
def code_of(module_class: Hashable) -> str:
    """Returns the source of a class and its bases, without torch's and without classes made at run time."""
    sources = []
    for base in cast(type, module_class).__mro__:
        with suppress(OSError, TypeError):
            sources.append("" if base.__module__.startswith("torch.") else class_source(base))
    return "\n".join(sources)


def takes_top_k(*modules: nn.Module | None) -> bool:
    """Returns whether the code of any of `modules` takes a top-k."""
    return any("topk(" in code_of(cast(Hashable, type(module))) for module in modules if module is not None)


@functools.cache
def returned_values(router_class: Hashable) -> list[str]:
    """
    Returns for each output of a router's forward which of `"softmax"` and `"scatter"` was applied last, or `""`.

    `"softmax"` gives probabilities, `"scatter"` gives top-k weights in E columns.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cast(Any, router_class).forward)))
    except (OSError, TypeError, SyntaxError):
        return []
    made: dict[str, str] = {}
    statements = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.Return))]
    for node in sorted(statements, key=lambda node: node.lineno):
        if isinstance(node, ast.Return):
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            return [made.get(value.id, "") if isinstance(value, ast.Name) else "" for value in values]
        name, value = ast.unparse(node.targets[0]), ast.unparse(node.value)
        how = re.search(r"(softmax|scatter)_?\(", value)
        made[name] = how[1] if how else made.get(name, "") if re.search(rf"\b{re.escape(name)}\b", value) else ""
    return []


# ---------------------------------------------------------------------- model types

# Patterns in the source of a block: it has experts; the class of its router.
WITH_EXPERTS = re.compile(r"self\.experts = |Experts\(")
ROUTER_MADE = re.compile(r"self\.(?:gate|router) = (nn\.)?(\w+)\(")


@dataclass(frozen=True)
class Family:
    """A row of [`supported_families`]."""

    model_type: str
    router: str
    scoring: str
    selection_bias: str
    refused: str | None = None


def supported_families(images: bool = False) -> dict[str, Family]:
    """
    Returns every causal-LM model type of the installed transformers that has routers, without building a model.

    Args:
        images (`bool`, *optional*, defaults to `False`):
            Return the model types of `AutoModelForImageTextToText` instead. A model that takes any language model
            (InternVL, LLaVA, ...) is included if its default language model has routers.

    Returns:
        `dict[str, Family]`: By model type. Includes families that cannot be balanced; their `refused` says why.
    """
    from transformers.models.auto import modeling_auto

    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    classes: dict[str, list[Any]] = {model_type: [names] for model_type, names in text.items()}
    if images:
        classes = {
            model_type: [names, text.get(_language_model(model_type), "")]
            for model_type, names in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
            if "vision_config" in transformers.CONFIG_MAPPING[model_type].sub_configs  # one type is a language model
        }
    families = {}
    for model_type, candidates in sorted(classes.items()):
        modules = [module for names in candidates if (module := _module_with(names)) is not None]
        found = next(((kinds[0], module) for module in modules if (kinds := _kinds_in(module))), None)
        if found is not None:
            families[model_type] = _family(model_type, found[0], inspect.getsource(found[1]))
    return families


def _module_with(class_names: str | tuple[str, ...]) -> Any:
    """Returns the modelling module of a transformers class, or `None`."""
    name = class_names if isinstance(class_names, str) else next(iter(class_names), "")
    model_class = getattr(transformers, name, None)
    return None if model_class is None else sys.modules.get(model_class.__module__)


def _language_model(model_type: str) -> str:
    """Returns the model type of the default language model of `model_type`."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    if "text_config" not in config_class.sub_configs:
        return ""
    return str(getattr(config_class().text_config, "model_type", ""))


def _kinds_in(module: Any) -> list[RouterKind]:
    """Returns the routers of a modelling module: the declared ones, else those its source creates beside experts."""
    source = inspect.getsource(module)
    codes = {code.split("(")[0].split(":")[0]: code for code in re.split(r"^class ", source, flags=re.MULTILINE)[1:]}
    with_experts = {name: code for name, code in codes.items() if WITH_EXPERTS.search(code)}
    made = {made: name for name, code in with_experts.items() for made in ROUTER_MADE.findall(code)}
    blocks = {
        getattr(nn if torchs else module, name): getattr(module, block) for (torchs, name), block in made.items()
    }
    declared = {k.target: k for name in codes for k in declared_kinds(getattr(module, name))}
    plain = {target: kind for target, kind in declared.items() if target.__name__ not in with_experts}
    # some classes declare an outer block instead of the routers inside it
    takes = {name for name, code in codes.items() if "topk(" in code}
    kinds = [kind for target, kind in plain.items() if target in blocks or target.__name__ in takes]
    if not kinds and not blocks:
        kinds = list(plain.values())
    if not kinds and "topk(" in source:
        kinds = [RouterKind(target, traits=TRAITS.get(target.__name__, RouterTraits())) for target in blocks]
    return [k if k.target.__name__ in takes else replace(k, block=blocks.get(k.target)) for k in kinds]


def _family(model_type: str, kind: RouterKind, model_source: str) -> Family:
    names = "|".join(NATIVE_BIAS_NAMES)
    has_native = re.search(rf'self\.({names}) = |register_buffer\("({names})"', model_source)
    bias = f"none: {kind.traits.no_bias}" if kind.traits.no_bias else "native" if has_native else "re-selected"
    scoring = kind.scoring if isinstance(kind.scoring, str) else "by config"
    return Family(model_type, kind.target.__name__, scoring, bias, kind.traits.refused)
