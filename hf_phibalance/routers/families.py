"""Which model types of the installed transformers have routers, without building a model."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

import transformers
from torch import nn

from .traits import NATIVE_BIAS_NAMES, TRAITS, RouterKind, RouterTraits, declared_kinds


# In the source of a block: that it makes experts, and the class of the router that it makes beside them.
WITH_EXPERTS = re.compile(r"self\.experts = |Experts\(")
ROUTER_MADE = re.compile(r"self\.(?:gate|router) = (nn\.)?(\w+)\(")


@dataclass(frozen=True)
class Family:
    """What is known about one model type without building it; see `supported_families`."""

    model_type: str
    router: str
    scoring: str
    selection_bias: str
    refused: str | None = None


def supported_families(images: bool = False) -> dict[str, Family]:
    """
    Every causal-LM model type of the installed transformers that has routers.

    Args:
        images (`bool`, *optional*, defaults to `False`):
            Those that `AutoModelForImageTextToText` loads instead. A model whose config takes any language model (InternVL,
            LLaVA, ...) is among them if that which it has by default has routers.

    Returns:
        `dict[str, Family]`: by model type, the refused ones included (with `refused` saying why).
    """
    from transformers.models.auto import modeling_auto

    text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    classes: dict[str, list[Any]] = {model_type: [names] for model_type, names in text.items()}
    if images:
        classes = {
            model_type: [names, text.get(_language_model(model_type), "")]
            for model_type, names in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
            if _reads_images(model_type)
        }
    families = {}
    for model_type, candidates in sorted(classes.items()):
        modules = [module for names in candidates if (module := _module_with(names)) is not None]
        found = next(((kinds[0], module) for module in modules if (kinds := _kinds_in(module))), None)
        if found is not None:
            families[model_type] = _family(model_type, found[0], inspect.getsource(found[1]))
    return families


def _module_with(class_names: str | tuple[str, ...]) -> Any:
    """The modelling module of a class of transformers, `None` if it is not there."""
    name = class_names if isinstance(class_names, str) else next(iter(class_names), "")
    model_class = getattr(transformers, name, None)
    return None if model_class is None else sys.modules.get(model_class.__module__)


def _reads_images(model_type: str) -> bool:
    """Whether the config of `model_type` has a vision tower: one language model is among those that read images as well."""
    return "vision_config" in transformers.CONFIG_MAPPING[model_type].sub_configs


def _language_model(model_type: str) -> str:
    """Model type of the language model that a model of `model_type` has by default."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    if "text_config" not in config_class.sub_configs:
        return ""
    return str(getattr(config_class().text_config, "model_type", ""))


def _kinds_in(module: Any) -> list[RouterKind]:
    """Router kinds of a modelling module, by its source: as transformers declares, or else by their contract."""
    source = inspect.getsource(module)
    codes = {code.split("(")[0].split(":")[0]: code for code in re.split(r"^class ", source, flags=re.MULTILINE)[1:]}
    with_experts = {name: code for name, code in codes.items() if WITH_EXPERTS.search(code)}
    made = {made: name for name, code in with_experts.items() for made in ROUTER_MADE.findall(code)}
    blocks = {
        getattr(nn if torchs else module, name): getattr(module, block) for (torchs, name), block in made.items()
    }
    declared = {k.target: k for name in codes for k in declared_kinds(getattr(module, name))}
    # a block that holds others with a router each may be declared instead of these
    takes = {name for name, code in codes.items() if "topk(" in code}
    kinds = [
        kind
        for target, kind in declared.items()
        if target.__name__ not in with_experts and (target in blocks or target.__name__ in takes)
    ] or [kind for target, kind in declared.items() if target.__name__ not in with_experts and not blocks]
    if not kinds and "topk(" in source:
        kinds = [RouterKind(target, traits=TRAITS.get(target.__name__, RouterTraits())) for target in blocks]
    return [
        kind if "topk(" in codes.get(kind.target.__name__, "") else replace(kind, block=blocks.get(kind.target))
        for kind in kinds
    ]


def _family(model_type: str, kind: RouterKind, model_source: str) -> Family:
    names = "|".join(NATIVE_BIAS_NAMES)
    has_native = re.search(rf'self\.({names}) = |register_buffer\("({names})"', model_source)
    bias = f"none: {kind.traits.no_bias}" if kind.traits.no_bias else "native" if has_native else "re-selected"
    return Family(
        model_type,
        kind.target.__name__,
        kind.scoring if isinstance(kind.scoring, str) else "by config",
        bias,
        kind.traits.refused,
    )
