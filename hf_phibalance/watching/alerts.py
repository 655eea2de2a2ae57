"""
Alerts: what goes wrong in routers, with a reason and a remedy. They are a function of the lines of `moe.jsonl`.

| kind | begins when |
|---|---|
| `dead_experts` | experts get less than 5 % of the fair share for N steps, and had more than a fifth of it before, or get nothing at all |
| `collapsed_layer` | a layer uses half as many experts as at its best, or sends all tokens to the same `top_k` experts |
| `unmoved_router` | a router is frozen while its experts are trained in full, gets no gradient, or its steps are rounded away |
| `even_probabilities` | probabilities are even while loads are not, as in routers that are new |
| `not_finite` | probabilities are NaN or infinite |

Shapes: E experts, T tokens, k experts per token.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..maths import DEAD_THRESHOLD, max_vio, noise_floor, relative_load


ALIVE = 4  # an expert with this many times the load of a dead one is alive
ENOUGH = 5  # logs before the scatter between them is known
HISTORY = 1000  # logs that it is computed from
RECOVERED = 1.2  # a collapsed layer must use this many times more experts before it counts as recovered


@dataclass(frozen=True)
class Thresholds:
    """
    Thresholds of the alerts.

    Args:
        false_alarm (`float`, *optional*, defaults to `1e-9`):
            Probability, at most, that chance makes one expert look dead, or one layer collapsed, at one log. A run with 48 layers of 128
            experts and 1,000 logs makes 6 million such tests, so 0.6 % of these runs have a false alarm.
        steps (`int`, *optional*, defaults to `100`):
            Optimizer steps N that a state must last. Tokens of one step resemble each other; steps do not. An expert that one step in
            five uses is missed by all of 100 steps with probability 0.8^100 = 2e-10.
        dead_load (`float`, *optional*, defaults to `0.05`):
            Experts with less than this part of the fair load are dead. The test takes an expert's number of tokens for a Poisson variable:
            one without tokens is called dead after 414 tokens per expert.
        collapse (`float`, *optional*, defaults to `0.5`):
            A layer has collapsed if it uses less than this part of the experts that it used at its best, see [`experts_in_use`]. The
            fall must also be greater than 6 standard deviations (from `false_alarm`) of the scatter between logs.
        even_probs (`float`, *optional*, defaults to `0.02`): Mean probabilities this close to each other, relatively, are even.
        uneven_load (`float`, *optional*, defaults to `0.5`):
            Loads are uneven if MaxVio exceeds three noise floors by this much. Three floors are at least 5 standard deviations of a load,
            so chance alone exceeds them with probability 3e-7 per expert.
        unmoved (`float`, *optional*, defaults to `0.5`):
            A router in 16 bits does not move if more than this part of its weights have not changed in N steps. In float32 every step
            changes all weights.
    """

    false_alarm: float = 1e-9
    steps: int = 100
    dead_load: float = DEAD_THRESHOLD
    collapse: float = 0.5
    even_probs: float = 0.02
    uneven_load: float = 0.5
    unmoved: float = 0.5

    def __post_init__(self) -> None:
        for each in fields(self):
            value, top = getattr(self, each.name), math.inf if each.name in ("steps", "uneven_load") else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= top:
                raise ValueError(
                    f"`{each.name}` of Thresholds must be above 0{'' if top > 1 else ' and at most 1'}, got {value!r}."
                )


State = tuple[str, set[int], str, str]  # kind, experts, reason and remedy


class RouterAlert(RuntimeError):
    """
    Raised by a watched run with `on_alert="raise"`.

    Attributes:
        alerts (`list[dict]`): the alerts that began, as in `moe.jsonl`.
    """

    def __init__(self, alerts: list[dict[str, Any]]) -> None:
        self.alerts = alerts
        super().__init__("\n".join(text_of(alert) for alert in alerts))


def text_of(alert: Mapping[str, Any]) -> str:
    """Returns an alert as a sentence."""
    return f"{alert['kind']}: router {alert['layer']!r}: {alert['reason']} {alert['remedy']}"


class _Layer:
    """What is remembered of one router."""

    def __init__(self) -> None:
        self.windows: deque[tuple[int, Tensor, Tensor]] = deque()  # steps, load and summed probabilities, each (E,)
        self.steps = 0  # of the windows
        self.alive: Tensor | None = None  # (E,) experts that have had a load
        self.used: deque[float] = deque(maxlen=HISTORY)  # log of the number of experts in use, at each log
        self.best = -math.inf  # greatest of them over N steps
        self.on: dict[str, set[int]] = {}  # alerts that have begun and not ended, and their experts

    def scatter(self) -> float:
        """
        Returns the standard deviation of `used` between logs, from the median of the differences between neighbours, so that a trend
        does not count.
        """
        jumps = [abs(after - before) for before, after in pairwise(self.used)]
        return statistics.median(jumps) * 1.4826 / math.sqrt(2) if len(jumps) >= ENOUGH else math.inf


class Alerts:
    """
    Finds the alerts in the rows of a run.

    Args:
        thresholds (`Thresholds`): when an alert begins.
        routers (`list[dict]`): `name`, `experts` and `top_k` of each router, as in the `run` line.
        method (`str`): balancing method of the run.
    """

    def __init__(self, thresholds: Thresholds, routers: list[dict[str, Any]], method: str = "none") -> None:
        self.thresholds, self.method = thresholds, method
        self.top_k = {router["name"]: router["top_k"] for router in routers}
        self._layers = {router["name"]: _Layer() for router in routers}
        self._deviations = statistics.NormalDist().inv_cdf(1 - thresholds.false_alarm)

    def add(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Takes the next row. Returns the alerts that begin with it: `kind`, `layer`, `experts`, `reason` and `remedy`."""
        found = []
        for name, figures in row["layers"].items():
            layer, seen = self._layers[name], {}
            for kind, experts, reason, remedy in self._states(name, layer, row["steps"], figures):
                began = experts - layer.on.get(kind, set()) if experts else set()
                if began or kind not in layer.on:
                    if "{}" in reason:
                        reason = reason.format(", ".join(map(str, sorted(began))))
                    found.append(
                        {"kind": kind, "layer": name, "experts": sorted(began), "reason": reason, "remedy": remedy}
                    )
                seen[kind] = experts
            layer.on = seen
        return found

    def _states(self, name: str, layer: _Layer, steps: int, figures: Mapping[str, Any]) -> Iterator[State]:
        """Yields each state that holds at this row."""
        yield from self._unmoved(figures.get("router"))
        load = torch.tensor(figures["load"], dtype=torch.float64)
        if None in figures["probs"]:
            yield (
                "not_finite", set(), "its probabilities are NaN or infinite.",
                "Resume from an earlier checkpoint with a lower learning rate, and check the data of these steps.",
            )  # fmt: skip
            return
        probs = torch.tensor(figures["probs"], dtype=torch.float64) * (load.sum() / self.top_k[name])
        layer.windows.append((steps, load, probs))
        layer.steps += steps
        while layer.steps - layer.windows[0][0] >= self.thresholds.steps:
            layer.steps -= layer.windows.popleft()[0]
        recent = torch.stack([load for _, load, _ in layer.windows]).sum(0)
        probs = torch.stack([summed for _, _, summed in layer.windows]).sum(0)
        if not recent.sum():
            return
        yield from self._collapsed(name, layer, load, recent)
        yield from self._dead(layer, recent)
        yield from self._even(name, layer, recent, probs)

    # ------------------------------------------------------------------ the kinds

    def _dead(self, layer: _Layer, recent: Tensor) -> Iterator[State]:
        """`recent (E,)`: selections of each expert in the last N steps."""
        limit, chance = self.thresholds.dead_load, self.thresholds.false_alarm
        bound = (limit * recent.mean()).expand_as(recent)  # expected count of an expert that is just not dead
        # P(X <= n) of a Poisson variable with mean m is Q(n + 1, m); P(X >= n) is P(n, m)
        few = torch.special.gammaincc(recent + 1, bound) <= chance
        alive = (torch.special.gammainc(recent.clamp(min=1e-9), ALIVE * bound) <= chance) & (recent > ALIVE * bound)
        layer.alive = alive if layer.alive is None else layer.alive | alive
        if layer.steps < self.thresholds.steps:
            return
        was_dead = torch.zeros_like(few)
        was_dead[sorted(layer.on.get("dead_experts", ()))] = True
        many = (torch.special.gammainc(recent.clamp(min=1e-9), bound) <= chance) & (recent > bound)
        dead = torch.where(was_dead, ~many, few & (layer.alive | (recent == 0)))
        if dead.any():
            share = float(recent[dead].max() / recent.mean())
            yield (
                "dead_experts", set(dead.nonzero().flatten().tolist()),
                f"expert(s) {{}} got at most {share:.1%} of a fair share of the tokens in the last {layer.steps} steps.",
                self._balance(),
            )  # fmt: skip

    def _collapsed(self, name: str, layer: _Layer, load: Tensor, recent: Tensor) -> Iterator[State]:
        """`load (E,)` of this row, `recent (E,)` of the last N steps."""
        experts, top_k = len(load), self.top_k[name]
        if load.sum():
            layer.used.append(math.log(experts_in_use(load, top_k)))
        used = math.log(experts_in_use(recent, top_k))
        enough = layer.steps >= self.thresholds.steps
        factor = self.thresholds.collapse * (RECOVERED if "collapsed_layer" in layer.on else 1.0)
        fallen = used < layer.best + math.log(factor) and layer.best - used > self._deviations * layer.scatter()
        rest = recent.sort().values[: experts - top_k]  # those outside the busiest
        alone = bool(len(rest)) and float(rest.mean() / recent.mean()) < self.thresholds.dead_load
        if enough and (fallen or alone):
            before = f", and {math.exp(layer.best):.1f} at its best" if fallen else ""
            yield (
                "collapsed_layer", set(),
                f"its tokens went to {math.exp(used):.1f} of {experts} experts in the last {layer.steps} steps{before}.",
                f"Resume from a checkpoint before that. {self._balance()}",
            )  # fmt: skip
        layer.best = max(layer.best, used) if enough or math.isinf(layer.best) else layer.best

    def _even(self, name: str, layer: _Layer, recent: Tensor, probs: Tensor) -> Iterator[State]:
        """`probs (E,)`: summed probabilities of the last N steps."""
        if layer.steps < self.thresholds.steps:
            return
        tokens = float(recent.sum()) / self.top_k[name]
        even, uneven = float((relative_load(probs) - 1).abs().max()), float(max_vio(recent))
        floor = float(noise_floor(len(recent), self.top_k[name], tokens))
        if even < self.thresholds.even_probs and uneven > 3 * floor + self.thresholds.uneven_load:
            yield (
                "even_probabilities", set(),
                f"its mean probabilities are even (to {even:.1%}) while its loads are not (MaxVio {uneven:.2f}), as in new routers.",
                "A price on probabilities would do nothing: balance with track='load', or with bias_coef=0.003.",
            )  # fmt: skip

    def _unmoved(self, router: Mapping[str, Any] | None) -> Iterator[State]:
        """`router`: what a row says of the router's weights."""
        if router is None:
            return
        kind, unchanged, since = "unmoved_router", router.get("unchanged"), router.get("since", 0)
        if router["learns"] == "frozen":
            if router["experts"] == "full" and self.method != "frozen":
                yield (
                    kind, set(), "it is frozen while its experts are trained in full.",
                    "Train it too (requires_grad_(True)). If you want it frozen, call phb.patch(model, {'method': 'frozen'}).",
                )  # fmt: skip
        elif unchanged is None or since < self.thresholds.steps:
            return
        elif router["gradient"] is False or (router["gradient"] is None and unchanged == 1):
            yield (
                kind, set(), f"no gradient has reached its weights in {since} steps.",
                "The loss does not depend on its weights, for instance because the weight of a single chosen expert is always 1. "
                "Balance with coef=0.01, which gives the router a gradient, or freeze it by method='frozen'.",
            )  # fmt: skip
        elif unchanged > self.thresholds.unmoved and router["dtype"] in ("bfloat16", "float16"):
            yield (
                kind, set(),
                f"{unchanged:.0%} of its {router['dtype']} weights have not changed in {since} steps: the optimizer's steps are rounded away.",
                "Keep its weights in float32: phb.patch(model, {'method': 'none', 'fp32_routers': True}), or add fp32_routers=True to your coef.",
            )  # fmt: skip
        elif unchanged == 1:
            yield (
                kind, set(), f"it has a gradient, but its weights have not changed in {since} steps.",
                "Make the optimizer after all adapters are added, give it all trained parameters, and a learning rate above 0.",
            )  # fmt: skip

    def _balance(self) -> str:
        if self.method in ("none", "frozen"):
            return "Balance the routers: phb.patch(model, {'coef': 0.01}), from scratch with 'bias_coef': 0.003 too."
        return "Balance more: raise coef, or set bias_coef=0.003."


def experts_in_use(load_E: Tensor, top_k: int) -> float:
    """
    Returns 1 / Σ share² of the loads: k if only k experts are used, E if all are used equally. The part of Σ share² that chance adds
    for T tokens, (E - k) / (T k E) on average, is subtracted first.
    """
    experts = len(load_E)
    chance = (experts - top_k) / (float(load_E.sum()) * experts)
    squares = float((load_E / load_E.sum()).square().sum()) - chance
    return min(1 / max(squares, 1 / experts), experts)
