"""Switches off the auxiliary loss of the model or its trainer while φ-balancing is on."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..routers import REMOTE_TRAITS
from .undo import Undo


logger = logging.get_logger(__name__)
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
# Stands for 0: some remote code computes its loss only `if alpha > 0`, but uses it in any case.
VANISHING = 1e-300


def switch_off_built_in_loss(root: nn.Module, undo: Undo) -> bool:
    """Sets every coefficient of the family's own auxiliary loss to 0; returns whether one was on."""
    was_on = False
    whole: Any = getattr(root, "config", None)
    for config in {id(c): c for c in (whole, whole.get_text_config())}.values() if whole is not None else ():
        was_on |= bool(getattr(config, "output_router_logits", False))
        for name, off in (("output_router_logits", False), *((name, 0.0) for name in COEFFICIENTS)):
            if getattr(config, name, off) != off:
                undo.set(config, name, off)
    for module in root.modules():
        for name in COEFFICIENTS:
            if isinstance(module, PreTrainedModel) and vars(module).get(name):
                undo.set(module, name, 0.0)
        if type(module).__name__ in REMOTE_TRAITS and (getattr(module, "alpha", None) or 0.0) > VANISHING:
            was_on = True
            undo.set(module, "alpha", VANISHING)  # coefficient of the gate's own auxiliary loss
    return was_on


def announce_switched_off() -> None:
    """Warns once, for the model's loss and the trainer's alike: TRL's trainers set theirs in the model's config too."""
    logger.warning_once(
        "φ-balancing is on: the auxiliary loss of the model or of its trainer (router_aux_loss_coef, "
        "output_router_logits) has been switched off. phb.unpatch(model) restores the model's."
    )
