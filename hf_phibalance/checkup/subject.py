"""What is examined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..balancing import PhiBalancer
from .observation import Observation


@dataclass
class Subject:
    """
    What is examined.

    Args:
        root (`torch.nn.Module`): the transformers model.
        balancer (`PhiBalancer`, *optional*): `None` if it is not patched.
        seen (`Observation`, *optional*): `None` if nothing could be run.
        batches (`Sequence[Mapping]`): the micro-batches of the step, as far as they are mappings.
        trainer (`str`, *optional*): name of the trainer's class.
        wiring (`str`, *optional*): how the trainer is wired: `"attached"`, `"callback"` or `"none"`.
        auxiliary (`float`): coefficient of an auxiliary loss that the trainer adds.
        parallel (`str`): what is wrong with the way of training.
        pad_token_id (`int`, *optional*): of the tokenizer.
        folder (`Path`, *optional*): the checkpoint that the model was loaded from.
        unmeasured (`str`): why the coefficient could not be measured.
    """

    root: nn.Module
    balancer: PhiBalancer | None
    seen: Observation | None = None
    batches: Sequence[Mapping[str, Any]] = field(default_factory=list)
    trainer: str | None = None
    wiring: str | None = None
    auxiliary: float = 0.0
    parallel: str = ""
    pad_token_id: int | None = None
    folder: Path | None = None
    unmeasured: str = ""


def many(names: Sequence[str]) -> str:
    """The first of `names`, for a sentence."""
    shown = ", ".join(names[:3])
    return f"{shown}, ..." if len(names) > 3 else shown
