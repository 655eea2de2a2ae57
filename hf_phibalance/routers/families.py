"""Which model types of the installed transformers have routers, without building a model."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

from .traits import NATIVE_BIAS_NAMES, RouterKind, declared_kinds


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
