"""One run of fine-tuning, the base that it starts from, and the keys by which both are found again."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import hf_phibalance as phb

from ..run import key_of, method_settings


@dataclass(frozen=True, kw_only=True)
class Base:
    """
    A model that is trained once, on text of several domains and on easy exercises.

    Args:
        name (`str`): As plans call it.
        model (`str`): A key of `models.MODELS`.
        method (`dict`): Arguments of `PhiBalanceConfig`.
        model_fields (`dict`): Fields of the model's config that differ.
        steps, rows (`int`): Optimizer steps, and windows of each.
        learning_rate (`float`): Peak.
        seed (`int`): Of weights and data.
        material (`str`): Fingerprint of the text.
    """

    name: str
    model: str
    method: dict[str, Any]
    model_fields: dict[str, Any] = field(default_factory=dict)
    steps: int = 3000
    rows: int = 8
    learning_rate: float = 0.003
    seed: int = 0
    material: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "method": method_settings(self.method)}

    @property
    def key(self) -> str:
        """Digest of all but its name and the text, which a file of weights bears beside it."""
        return key_of({name: value for name, value in self.settings.items() if name not in ("name", "material")})


@dataclass(kw_only=True)
class Training:
    """
    How a base is fine-tuned, whatever the method.

    Args:
        steps (`int`): Optimizer steps.
        tokens (`int`): About how many a step holds, padding not counted; a task's rows follow from it.
        micro_batches (`int`): Parts of a step.
        learning_rates (`dict[str, float]`): Peak by way; 5% warm-up, then a cosine to a tenth.
        weight_decay (`float`): Of matrices only.
        rank (`int`): Of adapters.
        portable (`bool`): Whether methods with a selection bias are also measured without it, see `compare.portable`.
    """

    steps: int = 150
    tokens: int = 1000
    micro_batches: int = 1
    learning_rates: dict[str, float] = field(default_factory=dict)
    weight_decay: float = 0.0
    rank: int = 8
    portable: bool = False


OWN = ("calibrate", "calibrate_bias")  # arguments of a method that are not those of PhiBalanceConfig


@dataclass(kw_only=True)
class Tuning(Training):
    """
    Everything a result depends on.

    Args:
        base (`Base`): What is tuned.
        task (`str`): A key of `exercises.EXERCISES`.
        way (`str`): A key of `ways.WAYS`.
        seed (`int`): Of the order of the data and of adapters.
        method (`dict`): Arguments of `PhiBalanceConfig`, and `calibrate`, batches to find the means by before step 1, and
            `calibrate_bias`, whether to find the bias by them as well.
        corpus (`str`): Fingerprint of the material.
    """

    base: Base
    task: str
    way: str
    seed: int
    method: dict[str, Any]
    corpus: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """All of it as plain JSON values; of the learning rates the one that is used."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        method = method_settings(self.config_arguments)
        method |= {name: self.method[name] for name in OWN if self.method.get(name)}
        own = {"base": self.base.key, "learning_rates": {self.way: self.learning_rate}, "method": method}
        return {**fields, **own, "portable": self.is_served_plainly}

    @property
    def key(self) -> str:
        return key_of(self.settings)

    @property
    def learning_rate(self) -> float:
        return self.learning_rates[self.way]

    @property
    def config_arguments(self) -> dict[str, Any]:
        return {name: value for name, value in self.method.items() if name not in OWN}

    @property
    def config(self) -> phb.PhiBalanceConfig:
        return phb.PhiBalanceConfig(**self.config_arguments)

    @property
    def is_served_plainly(self) -> bool:
        """Whether what is left without the selection bias is measured as well."""
        return self.portable and self.config.bias_coef > 0

    def __str__(self) -> str:
        if self.steps == 0:
            return f"{self.base.name} {self.task}, as it is"
        method = " ".join(f"{name}={value}" for name, value in self.method.items()) or "defaults"
        return f"{self.base.name} {self.task} {self.way} seed {self.seed}  {method}"
