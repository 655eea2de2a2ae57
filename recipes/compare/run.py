"""A run of the comparison: what its result depends on, and the key by which the result is found again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import hf_phibalance as phb


# Fields of PhiBalanceConfig that a result depends on although nobody wrote them down: those that any method reads, and
# those that φ reads. Others enter a key only where a plan sets them, so that neither a new field nor a new default that a
# run does not read makes earlier results look unfinished.
READ_BY_ALL = ("method", "coef", "bias_coef", "token_mask")
READ_BY_PHI = ("potential", "potential_kwargs", "ema_rate")
KEPT = object()
LATER: dict[str, Any] = {"portable": False, "device": "cpu", "precision": "fp32"}
READ_WITH = {"coef": ("track", "price_from"), "bias_coef": ("bias_track",)}  # only where that strength is not 0


@dataclass(kw_only=True)
class Training:
    """
    How a model is trained, whatever the method.

    Args:
        steps (`int`, *optional*, defaults to `500`): Optimizer steps.
        rows (`int`, *optional*, defaults to `9`): Windows of a step.
        window (`int`, *optional*, defaults to `64`): Tokens of a window.
        micro_batches (`int`, *optional*, defaults to `1`): Parts that a step is trained in. Rows are in the order of
            their domains, so with as many parts as domains each part of a mixed step holds one domain.
        learning_rate (`float`, *optional*, defaults to `0.003`): Peak; 5% warm-up, then a cosine to a tenth.
        weight_decay (`float`, *optional*, defaults to `0.1`): Of matrices only.
        model_fields (`dict`, *optional*): Fields of the model's config that differ from `models.MODELS`.
        vocab_size (`int`, *optional*, defaults to `1024`): Tokens of the tokenizer.
        validation_windows (`int`, *optional*, defaults to `192`): Held-out windows of each domain.
        portable (`bool`, *optional*, defaults to `False`): Whether methods with a selection bias are also measured without
            it, see `portable`.
        device (`str`, *optional*, defaults to `"cpu"`): Where to train.
        precision (`str`, *optional*, defaults to `"fp32"`): `"bf16"` for autocast over fp32 weights.
        corpus (`str`): Fingerprint of the text, see `corpus`.
    """

    steps: int = 500
    rows: int = 9
    window: int = 64
    micro_batches: int = 1
    learning_rate: float = 0.003
    weight_decay: float = 0.1
    model_fields: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = 1024
    validation_windows: int = 192
    portable: bool = False
    device: str = "cpu"
    precision: str = "fp32"
    corpus: str = ""


@dataclass(kw_only=True)
class Run(Training):
    """
    Everything a result depends on.

    Args:
        model (`str`): A key of `models.MODELS`.
        stream (`str`): One of `streams.STREAMS`.
        seed (`int`): Seed of the weights and of the order of the data.
        method (`dict`): Arguments of `PhiBalanceConfig`.
    """

    model: str
    stream: str
    seed: int
    method: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """All of it as plain JSON values, with what `PhiBalanceConfig` adds to `method`."""
        own = {"method": method_settings(self.method), "portable": self.is_served_plainly}
        return {**dataclasses.asdict(self), **own}

    @property
    def is_served_plainly(self) -> bool:
        """Whether what is left without the selection bias is measured as well."""
        return self.portable and self.config.bias_coef > 0

    @property
    def key(self) -> str:
        """What a result is found by, see [`key_of`]."""
        return key_of(self.settings)

    @property
    def config(self) -> phb.PhiBalanceConfig:
        return phb.PhiBalanceConfig(**self.method)

    def __str__(self) -> str:
        method = " ".join(f"{name}={value}" for name, value in self.method.items()) or "defaults"
        return f"{self.model} {self.stream} seed {self.seed}  {method}"


def method_settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `PhiBalanceConfig` with what it adds to them that a result depends on."""
    resolved = phb.PhiBalanceConfig(**arguments).to_dict()
    read = {*READ_BY_ALL, *arguments}
    if resolved["method"] == "phi":
        read |= {*READ_BY_PHI, *(name for lever, names in READ_WITH.items() if resolved[lever] for name in names)}
    return {name: resolved[name] for name in sorted(read)}


def key_of(settings: dict[str, Any]) -> str:
    """Digest of `Run.settings` but for the text, and for fields that came later and are as they were before."""
    told = {name: value for name, value in settings.items() if name != "corpus" and LATER.get(name, KEPT) != value}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
