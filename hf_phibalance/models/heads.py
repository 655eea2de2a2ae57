"""The head of a model, and the auto class of transformers that loads a model with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal


AutoClass = Literal[
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModel",
]
TEXT_CLASS: AutoClass = "AutoModelForCausalLM"
IMAGE_CLASS: AutoClass = "AutoModelForImageTextToText"
HEADS: dict[AutoClass, tuple[str, str]] = {  # the task of a model on the Hub, and in PEFT
    TEXT_CLASS: ("text-generation", "CAUSAL_LM"),
    IMAGE_CLASS: ("image-text-to-text", "CAUSAL_LM"),
    "AutoModelForSequenceClassification": ("text-classification", "SEQ_CLS"),
    "AutoModelForTokenClassification": ("token-classification", "TOKEN_CLS"),
    "AutoModelForQuestionAnswering": ("question-answering", "QUESTION_ANS"),
    "AutoModel": ("feature-extraction", "FEATURE_EXTRACTION"),
}


def auto_class_name(model_type: str, architectures: Sequence[str] | None) -> AutoClass:
    """
    Returns the auto class of transformers that loads a model with its head.

    Args:
        model_type (`str`): of its config.
        architectures (`Sequence[str]`, *optional*): names of its class: of config.json, or of the class and its parents.

    Raises:
        ValueError: if transformers has no auto class for this class.
    """
    found = find_auto_class(model_type, architectures)
    if found is None:
        raise ValueError(
            f"{', '.join(architectures or ())[:200]} of model_type={model_type!r} is loaded by none of {', '.join(HEADS)}, so its "
            "head would be lost. Load it with its own class, then call phb.patch(model)."
        )
    return found


def find_auto_class(model_type: str, architectures: Sequence[str] | None) -> AutoClass | None:
    """Returns what [`auto_class_name`] returns, or `None` where it raises."""
    from transformers.models.auto import modeling_auto as auto

    registries: Any = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        auto.MODEL_MAPPING_NAMES,
    )
    saved_as, known = tuple(architectures or ()), {}
    for name, registry in zip(HEADS, registries):
        classes = registry.get(model_type, ())
        known[name] = {classes} if isinstance(classes, str) else set(classes)
        if not known[name].isdisjoint(saved_as):
            return name
    if not saved_as:
        return IMAGE_CLASS if known[IMAGE_CLASS] and not known[TEXT_CLASS] else TEXT_CLASS
    ending = {name.removeprefix("AutoModelFor"): name for name in HEADS}  # of remote code
    default = None if any(known.values()) else TEXT_CLASS
    return next((ending[head] for head in ending for cls in saved_as if cls.endswith(head)), default)
