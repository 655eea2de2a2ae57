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
    """What is known about one causal-LM model type without building it; see `supported_families`."""

    model_type: str
    router: str
    scoring: str
    selection_bias: str
    refused: str | None = None


def supported_families() -> dict[str, Family]:
    """
    Every causal-LM model type of the installed transformers that has routers.

    Returns:
        `dict[str, Family]`: by model type, the refused ones included (with `refused` saying why).
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    families = {}
    for model_type, class_name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        model_class = getattr(transformers, class_name if isinstance(class_name, str) else class_name[0], None)
        if model_class is None:
            continue
        module = sys.modules[model_class.__module__]
        kinds = _kinds_in(module)
        if kinds:
            families[model_type] = _family(model_type, kinds[0], inspect.getsource(module))
    return families


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
    kinds = [kind for target, kind in declared.items() if target.__name__ not in with_experts]
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
