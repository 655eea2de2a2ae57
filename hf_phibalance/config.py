"""The user's settings: one validated dataclass that can be saved as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .files import LARGE, quoted, read_json
from .maths import METHODS, PHI_DEFAULTS, Method, Potential, get_potential


CONFIG_NAME = "phi_balance.json"
STATISTICS = ("probs", "load")
# Multiplier of `coef` at t = step / schedule_steps.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: max(0.0, 1.0 - t),
    "cosine": lambda t: (1.0 + math.cos(math.pi * min(t, 1.0))) / 2,
    "off": lambda t: float(t < 1.0),
}
CHOICES = {
    "track": STATISTICS,
    "bias_track": STATISTICS,
    "price_from": ("previous", "current", "global"),
    "token_mask": ("attention", "labels", "all"),
    "schedule": tuple(SCHEDULES),
}
# 1000 times the largest published coefficient; the model no longer learns its task there. Up to this value, gradients
# and biases of every potential stay finite in fp32 for 512 experts.
MAX_STRENGTH = 100.0
# At smaller rates, fp32 means get stuck up to 2^-25 / rate away from their value.
MIN_EMA_RATE = 1e-4
METHODS_OWN: Any = type("MethodsOwn", (), {"__repr__": lambda self: "the method's own"})()  # default of an unset field


def package_version() -> str:
    """Returns the version of the installed package, or `"0+unknown"` if it is not installed."""
    try:
        return version("hf_phibalance")
    except PackageNotFoundError:
        return "0+unknown"


@dataclass(frozen=True)
class PhiBalanceConfig:
    """
    Configuration of φ-balancing (arXiv 2605.15403) or of a baseline method.

    Coefficients (`coef` and `..._coef`) lie in [0, 100]; 0 switches that part off. Defaults are for `method="phi"`.
    Other methods fix most fields from `potential` to `price_from` and reject other values.

    Args:
        coef (`float`, *optional*, defaults to `0.01`):
            Coefficient of the price gradient. Each optimizer step adds exactly the gradient of
            `coef * sum_layers mean_tokens <q, p>`, for every split into micro-batches and ranks. For `"switch"`,
            `"global_batch"` (default 0.01) and `"pooled"` (default 0.001): the coefficient of their loss.
        bias_coef (`float`, *optional*, defaults to `0.0`):
            Step size of the selection bias, `b <- b - bias_coef * q`. The router adds `b` to the scores that it ranks
            (probabilities, sigmoid affinities or logits), for the *selection* only. Can be combined with `coef`, also
            for `"switch"` and `"global_batch"`, whose q is relative load - 1. For `"loss_free"` (default 0.001): the
            step of the sign. For `"quantile"` (default 1.0, in (0, 1]): the fraction of the way to the new bias.
        potential (`str`, *optional*, defaults to `"neg_entropy"`):
            Strictly convex potential φ, a key of `POTENTIALS`.
        potential_kwargs (`dict`, *optional*, defaults to `{}`):
            Parameter of the potential, for example `{"alpha": 1.1}` for `"tsallis"`.
        ema_rate (`float`, *optional*, defaults to `0.3`):
            η in [0.0001, 1], the weight of the *new* step in the mean `m <- (1 - η) m + η s`.
        track (`str`, *optional*, defaults to `"probs"`):
            Statistic s for the price gradient: `"probs"` (mean routing probabilities, Algorithm 1) or `"load"` (share
            of the top-k assignments).
        bias_track (`str`, *optional*, defaults to `"load"`):
            Statistic s for the selection bias, `"probs"` or `"load"`.
        price_from (`str`, *optional*, defaults to `"previous"`):
            `"previous"` computes prices from the mean after the previous step: the gradient does not depend on the
            split. `"current"` first mixes the current micro-batch into the mean (Algorithm 1). `"global"` first mixes
            in all micro-batches of the step so far, over all ranks, with one all-reduce per router. With `"current"`
            and `"global"` the gradient depends on the split.
        token_mask (`str`, *optional*, defaults to `"attention"`):
            Tokens that are balanced: `"attention"` (attention_mask != 0), `"labels"` (labels != -100) or `"all"`.
        method (`str`, *optional*, defaults to `"phi"`):
            Balancing method, a key of `METHODS`.
        z_loss_coef (`float`, *optional*, defaults to `0.0`):
            Coefficient of the router z-loss `z_loss_coef * sum_layers mean_tokens logsumexp(z)^2`
            (arXiv 2202.08906, Eq. 5), for any method.
        sequence_coef (`float`, *optional*, defaults to `0.0`):
            Coefficient of DeepSeek-V3's complementary sequence-wise loss (arXiv 2412.19437, Eqs. 17-20), for any
            method: `sequence_coef * sum_layers sum_e E f_e P_e` of each sequence. f_e is the expert's share of the
            top-k by unbiased scores, P_e its mean probability. Sequences are weighted by their number of tokens. The
            gradient is independent of the split if no sequence is split.
        schedule (`str`, *optional*, defaults to `"constant"`):
            Schedule of `coef` over the first `schedule_steps` optimizer steps: `"constant"`, `"linear"` or `"cosine"`
            (both down to 0), or `"off"` (constant, then 0).
        schedule_steps (`int`, *optional*, defaults to `0`):
            Length of the schedule in optimizer steps.
        fp32_routers (`bool`, *optional*, defaults to `False`):
            Keeps router weights in float32 in a 16-bit model, so that small optimizer steps are not rounded away.
            Routers still compute in the model's precision.

    Raises:
        ValueError: If a field is out of range, or the method does not use it. The message says how to fix it.
        TypeError: If a field is unknown.
    """

    coef: float = METHODS_OWN
    bias_coef: float = METHODS_OWN
    potential: str = METHODS_OWN
    potential_kwargs: dict[str, Any] = METHODS_OWN
    ema_rate: float = METHODS_OWN
    track: str = METHODS_OWN
    bias_track: str = METHODS_OWN
    price_from: str = METHODS_OWN
    token_mask: str = "attention"
    method: str = "phi"
    z_loss_coef: float = 0.0
    sequence_coef: float = 0.0
    schedule: str = "constant"
    schedule_steps: int = 0
    fp32_routers: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> PhiBalanceConfig:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in kwargs.keys() - known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{cls.__name__} has no field {name!r}.{meant} Its fields are {', '.join(known)}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(map(repr, METHODS))}, got {quoted(self.method)}.")
        for name in PHI_DEFAULTS:
            if getattr(self, name) is METHODS_OWN:
                object.__setattr__(self, name, self.rules.default(name))
        for name in ("coef", "bias_coef", "z_loss_coef", "sequence_coef"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= MAX_STRENGTH:
                raise ValueError(
                    f"`{name}` must lie in [0, {MAX_STRENGTH:g}] (0 switches it off), got {quoted(value)}; published strengths are "
                    "0.001 to 0.1."
                )
        if not _is_number(self.ema_rate) or not MIN_EMA_RATE <= self.ema_rate <= 1:
            raise ValueError(
                f"`ema_rate` must lie in [{MIN_EMA_RATE:g}, 1], got {quoted(self.ema_rate)}: it is the weight of the new step, "
                "so 1 keeps no memory and values near 0 average over many steps."
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {quoted(value)}.")
        if not isinstance(self.fp32_routers, bool):
            raise ValueError(f"`fp32_routers` must be True or False, got {quoted(self.fp32_routers)}.")
        steps = self.schedule_steps
        is_count = isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0
        if not is_count or (steps > 0) != (self.schedule != "constant"):
            raise ValueError(
                f"`schedule_steps` must be a number of optimizer steps > 0 with schedule='linear', 'cosine' or 'off', and 0 with "
                f"'constant'; got {quoted(steps)} with schedule={self.schedule!r}."
            )
        kwargs = self.potential_kwargs
        if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
            raise ValueError(f"`potential_kwargs` must be a dict such as {{'alpha': 1.1}}, got {quoted(kwargs)}.")
        object.__setattr__(self, "potential_kwargs", dict(kwargs))  # the caller may change theirs later
        self.build_potential()
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """Raises `ValueError` for fields that the method does not use, and for a `bias_coef` out of its range."""
        for name in PHI_DEFAULTS:
            value, own = getattr(self, name), self.rules.default(name)
            if name not in self.rules.free and value != own:
                free = ", ".join(f"`{field}`" for field in self.rules.free) or "none of them"
                raise ValueError(
                    f"`{name}` is {quoted(value)}, but method={self.method!r} does not read it (it stands for {own!r}). "
                    f"Leave it out; of the fields that φ-balancing reads, {self.method!r} reads {free}."
                )
        if self.rules.bias_rule == "quantile" and not 0 < self.bias_coef <= 1:
            raise ValueError(
                f"`bias_coef` must lie in (0, 1] for method={self.method!r}, got {self.bias_coef!r}: it is the "
                "fraction by which the bias moves to the new one, 1 keeps no memory."
            )

    @property
    def rules(self) -> Method:
        """The row of `method` in `METHODS`."""
        return METHODS[self.method]

    def build_potential(self) -> Potential:
        """Builds the potential from `potential` and `potential_kwargs`."""
        return get_potential(self.potential, **self.potential_kwargs)

    def coef_at(self, step: int) -> float:
        """Returns the scheduled `coef` after `step` optimizer steps."""
        return self.coef * SCHEDULES[self.schedule](step / self.schedule_steps if self.schedule_steps else 0.0)

    @property
    def is_on(self) -> bool:
        """Whether this config changes the routers. If not, their load is only counted."""
        return self.adds_gradient or self.bias_coef > 0

    @property
    def adds_gradient(self) -> bool:
        """Whether routers receive a gradient."""
        return self.coef > 0 or self.z_loss_coef > 0 or self.sequence_coef > 0

    @property
    def only_counts(self) -> bool:
        """Whether this config changes nothing and keeps nothing. A model under it is saved as one that is not patched."""
        return self.method == "none" and not self.is_on

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON values, and the version of this package as `"version"`."""
        return {**dataclasses.asdict(self), "version": package_version()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PhiBalanceConfig:
        """
        Inverse of [`~PhiBalanceConfig.to_dict`]. Missing fields take their defaults.

        Raises:
            ValueError: If a field is unknown, for example because a newer version wrote it, or out of range.
        """
        values = dict(values)
        written_by = values.pop("version", None)
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known), key=str)
        if unknown:
            origin = "a dict"
            if written_by:
                origin = f"written by hf_phibalance {quoted(written_by)}, this is {package_version()}"
            raise ValueError(
                f"unknown PhiBalanceConfig field(s) {quoted(unknown)} ({origin}). Known fields: "
                f"{', '.join(known)}. Upgrade hf_phibalance if a newer version wrote them, else correct or remove them."
            )
        return cls(**values)

    @classmethod
    def from_any(cls, value: Any, name: str = "`phi_balance`") -> PhiBalanceConfig | None:
        """
        Converts a `phi_balance` value from a config.json, a tool's YAML or an argument.

        Args:
            value: A config or a mapping of its fields; `True` for the defaults; `False` or `None` for no balancing.
            name (`str`, *optional*): The field or argument and its file, for the error message.

        Returns:
            `PhiBalanceConfig`, or `None` for no balancing.

        Raises:
            ValueError: For any other value, and if a field is unknown or out of range.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{name} must be a PhiBalanceConfig or a mapping of its fields such as {{'coef': 0.01}}, true for the defaults, "
                f"or false for no balancing; got {quoted(value)}."
            )
        try:
            return cls.from_dict(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @classmethod
    def of_checkpoint(cls, folder: str | os.PathLike) -> PhiBalanceConfig | None:
        """
        Returns the config in the config.json of `folder`; `None` for no balancing, or if there is no such file.

        Raises:
            ValueError: If the file is not a JSON object, or the config in it cannot be used.
        """
        path = Path(folder, "config.json")
        values = read_json(path, remedy="Save the model again.", limit=LARGE) if path.is_file() else {}
        return cls.from_any(values.get("phi_balance"), f"`phi_balance` in {path}")

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `phi_balance.json` into `directory` (created if missing) and returns its path."""
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> PhiBalanceConfig:
        """
        Reads a file of [`~PhiBalanceConfig.save`]. `path` is the file or its directory.

        Raises:
            ValueError: If the file is not a JSON object, or a field is unknown or out of range.
            OSError: If it cannot be read.
        """
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        values = read_json(path, remedy="Write it again with PhiBalanceConfig.save.")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)
