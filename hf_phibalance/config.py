"""What the user decides: one validated, serialisable dataclass."""

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
PRICE_TIMES = ("previous", "current", "global")
TOKEN_MASKS = ("attention", "labels", "all")
# The coefficient at a share t of `schedule_steps`, over the configured one.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: max(0.0, 1.0 - t),
    "cosine": lambda t: (1.0 + math.cos(math.pi * min(t, 1.0))) / 2,
    "off": lambda t: float(t < 1.0),
}
# A thousand times the strongest published coefficient. Beyond, the task is not trained any more; up to there, prices of any
# potential, 512 experts and what they add to gradients and biases stay finite in fp32 with room to spare.
MAX_STRENGTH = 100.0
# fp32 means that move more slowly than this stop moving altogether: they miss their value by up to 2^-25 / rate.
MIN_EMA_RATE = 1e-4
METHODS_OWN: Any = type("MethodsOwn", (), {"__repr__": lambda self: "the method's own"})()  # of a field left out


def package_version() -> str:
    """Version of the installed package, `"0+unknown"` in a source tree that was never installed."""
    try:
        return version("hf_phibalance")
    except PackageNotFoundError:
        return "0+unknown"


@dataclass(frozen=True)
class PhiBalanceConfig:
    r"""
    Configuration of φ-balancing (arXiv 2605.15403), or of a method that it is compared with. Strengths (`..._coef`) lie in
    [0, 100].

    Args:
        coef (`float`, *optional*, defaults to `0.01`):
            Strength of the price gradient: one optimizer step receives exactly the gradient of
            `coef * sum_layers mean_tokens <q, p>`, whatever the split into micro-batches and ranks. `0` switches it
            off. For `"switch"` and `"global_batch"` (0.01) and `"pooled"` (0.001) the coefficient of their loss.
        bias_coef (`float`, *optional*, defaults to `0.0`):
            Step size of the dual-ascent selection bias `b <- b - bias_coef * q`, added to the scores that the router
            ranks (probabilities, sigmoid affinities, or logits where the family ranks logits) for the *selection*
            only. `0` switches it off. Both levers may be on, also with `"switch"` and `"global_batch"`, whose q is the
            excess of the relative load of the step. For `"loss_free"` (0.001) the step of the sign; for `"quantile"`
            (1.0, in (0, 1]) the fraction by which the bias moves to the new one.
        potential (`str`, *optional*, defaults to `"neg_entropy"`):
            Strictly convex potential φ, a key of `POTENTIALS`.
        potential_kwargs (`dict`, *optional*, defaults to `{}`):
            Parameters of a parametrised potential, for example `{"alpha": 1.1}` for `"tsallis"`.
        ema_rate (`float`, *optional*, defaults to `0.3`):
            η in [0.0001, 1]: the weight of the *new* step in `m <- (1 - η) m + η s`.
        track (`str`, *optional*, defaults to `"probs"`):
            Statistic behind the gradient's price: `"probs"` (mean routing probability, Algorithm 1) or `"load"`
            (share of the top-k assignments).
        bias_track (`str`, *optional*, defaults to `"load"`):
            Statistic behind the bias's price, same choices.
        price_from (`str`, *optional*, defaults to `"previous"`):
            `"previous"` prices a step with the state that the previous one left, which makes the gradient invariant
            to every split. `"current"` mixes the statistic of the micro-batch at hand in first, as Algorithm 1 does,
            and `"global"` that of the step so far, over its micro-batches and all ranks, at the cost of an all-reduce
            per router; the price then depends on the split, so the invariance is lost.
        token_mask (`str`, *optional*, defaults to `"attention"`):
            Tokens that count and pay: `"attention"` (attention_mask != 0), `"labels"` (labels != -100) or `"all"`.
        method (`str`, *optional*, defaults to `"phi"`):
            A key of `METHODS`. The baselines fix most of the fields above, whose defaults are given for `"phi"`; a
            value that a method does not read is refused.
        z_loss_coef (`float`, *optional*, defaults to `0.0`):
            Adds the router z-loss `z_loss_coef * sum_layers mean_tokens logsumexp(z)^2` (arXiv 2202.08906, Eq. 5), to
            any method.
        sequence_coef (`float`, *optional*, defaults to `0.0`):
            Adds the complementary sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, Eqs. 17-20), to any method:
            `sequence_coef * sum_layers sum_e E f_e P_e` of each sequence, f its shares of the top-k of the unbiased
            scores, P its mean probabilities; a mean over sequences weighted by their tokens, so that it is as
            invariant to the split as the price gradient, as long as a sequence is in one micro-batch.
        schedule (`str`, *optional*, defaults to `"constant"`):
            How `coef` goes on over the first `schedule_steps` optimizer steps: `"constant"`; `"linear"` or `"cosine"`, down to
            0; or `"off"`, which stays until then and is 0 afterwards.
        schedule_steps (`int`, *optional*, defaults to `0`): Length of the schedule.
        fp32_routers (`bool`, *optional*, defaults to `False`):
            For models in 16 bits, whose precision rounds small steps of the optimizer away: keeps the weights of the routers in
            float32. Routers still compute in the model's precision.

    Raises:
        ValueError: if a field is out of range, or has no meaning for the method; the message names the field, the
            value and the remedy.
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
        for name, choices in (
            ("track", STATISTICS),
            ("bias_track", STATISTICS),
            ("price_from", PRICE_TIMES),
            ("token_mask", TOKEN_MASKS),
            ("schedule", tuple(SCHEDULES)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {quoted(value)}.")
        if not isinstance(self.fp32_routers, bool):
            raise ValueError(f"`fp32_routers` must be True or False, got {quoted(self.fp32_routers)}.")
        steps = self.schedule_steps
        if (
            isinstance(steps, bool)
            or not isinstance(steps, int)
            or steps < 0
            or (steps > 0) != (self.schedule != "constant")
        ):
            raise ValueError(
                f"`schedule_steps` must be a number of optimizer steps > 0 with schedule='linear', 'cosine' or 'off', and 0 with "
                f"'constant'; got {quoted(steps)} with schedule={self.schedule!r}."
            )
        kwargs = self.potential_kwargs
        if not isinstance(kwargs, dict) or not all(isinstance(name, str) for name in kwargs):
            raise ValueError(f"`potential_kwargs` must be a dict such as {{'alpha': 1.1}}, got {quoted(kwargs)}.")
        object.__setattr__(self, "potential_kwargs", dict(kwargs))  # the caller's may change later
        self.build_potential()
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        for name in PHI_DEFAULTS:
            value, own = getattr(self, name), self.rules.default(name)
            if name not in self.rules.free and value != own:
                free = ", ".join(f"`{field}`" for field in PHI_DEFAULTS if field in self.rules.free) or "none of them"
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
        """What `method` stands for."""
        return METHODS[self.method]

    def build_potential(self) -> Potential:
        """The potential that `potential` and `potential_kwargs` name."""
        return get_potential(self.potential, **self.potential_kwargs)

    def coef_at(self, step: int) -> float:
        """`coef` after so many optimizer steps, by the schedule."""
        return self.coef * SCHEDULES[self.schedule](step / self.schedule_steps if self.schedule_steps else 0.0)

    @property
    def is_on(self) -> bool:
        """Whether anything acts on the routers; with all strengths 0 they are only counted."""
        return self.adds_gradient or self.bias_coef > 0

    @property
    def adds_gradient(self) -> bool:
        """Whether routers receive a gradient."""
        return self.coef > 0 or self.z_loss_coef > 0 or self.sequence_coef > 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics whose EMA is kept, in a fixed order."""
        return tuple(name for name in STATISTICS if name in (self.track, self.bias_track))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values, with the version that wrote them under `"version"`."""
        return {**dataclasses.asdict(self), "version": package_version()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PhiBalanceConfig:
        """
        Inverse of [`~PhiBalanceConfig.to_dict`]; missing fields take their defaults.

        Raises:
            ValueError: if a key is unknown, for example because a newer version wrote it.
        """
        values = dict(values)
        written_by = values.pop("version", None)
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known), key=str)
        if unknown:
            origin = (
                f"written by hf_phibalance {quoted(written_by)}, this is {package_version()}"
                if written_by
                else "a dict"
            )
            raise ValueError(
                f"unknown PhiBalanceConfig field(s) {quoted(unknown)} ({origin}). Known fields: "
                f"{', '.join(known)}. Upgrade hf_phibalance if a newer version wrote them, else correct or remove them."
            )
        return cls(**values)

    @classmethod
    def from_any(cls, value: Any, name: str = "`phi_balance`") -> PhiBalanceConfig | None:
        """
        Decides what a value of `phi_balance` means: in a config.json, in a tool's YAML, or as an argument.

        Args:
            value: a config or a mapping of its fields; `True` for the defaults; `False` or `None` for no balancing.
            name (`str`, *optional*): of the field or argument, and of its file, for the message.

        Returns:
            `PhiBalanceConfig`, or `None` for no balancing.

        Raises:
            ValueError: for any other value, and for a field that is unknown or out of range.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            try:
                return cls.from_dict(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        raise ValueError(
            f"{name} must be a PhiBalanceConfig or a mapping of its fields such as {{'coef': 0.01}}, true for the defaults, or "
            f"false for no balancing; got {quoted(value)}."
        )

    @classmethod
    def of_checkpoint(cls, folder: str | os.PathLike) -> PhiBalanceConfig | None:
        """
        Returns what the config.json in `folder` says of balancing; `None` for no balancing, or if there is no such file.

        Raises:
            ValueError: if the file is no JSON object, or what it says cannot be used.
        """
        path = Path(folder, "config.json")
        values = read_json(path, remedy="Save the model again.", limit=LARGE) if path.is_file() else {}
        return cls.from_any(values.get("phi_balance"), f"`phi_balance` in {path}")

    def save(self, directory: str | os.PathLike) -> Path:
        """Writes `phi_balance.json` into `directory` (made if missing) and returns its path."""
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> PhiBalanceConfig:
        """
        Reads what [`~PhiBalanceConfig.save`] wrote, from the file or from its directory.

        Raises:
            ValueError: if the file is no JSON object or holds an invalid field; nothing in it is run.
            OSError: if it cannot be read.
        """
        path = Path(path)
        if path.is_dir():
            path = path / CONFIG_NAME
        values = read_json(path, remedy="Write it again with PhiBalanceConfig.save.")
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, float)
