"""
The potentials φ, whose gradients are the expert prices.

φ-balancing (arXiv 2605.15403) minimises φ of the mean routing probabilities m. φ is strictly convex and symmetric, so
its only minimum on the simplex is the uniform distribution (Lemma 1). Expert prices are q = ∇φ(m) (Algorithm 1).

Three conventions make prices comparable between potentials and numbers of experts:

- φ takes the relative load r = E·m, which is 1 for every expert at balance.
- φ(r) = Σ_e f(r_e) with f(1) = f'(1) = 0 and f''(1) = 1. Near balance, every potential therefore prices an expert at
  r_e - 1. Potentials differ only far from balance.
- Below `floor`, f continues along its tangent. φ stays convex and differentiable, and ∇φ is finite at a load of 0.

Some named potentials coincide in these units. Entropies and norms are one family of powers: "tsallis" with alpha 0,
0.5, 1, 2, 3 is "log_barrier", "hellinger", "neg_entropy", "l2", "l3". "softplus" is a wider "log_cosh".

To add a potential, write its f and its slope as a subclass of [`Potential`] and add a row to [`POTENTIALS`].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


# A millionth of the fair share counts as dead: log(1e-6) = -13.8, and a mean of fp32 probabilities still resolves it.
MIN_RELATIVE_LOAD = 1e-6
# If f' diverges faster than log, the floor is higher, so that no price falls below minus this value.
MAX_DISCOUNT = 100.0


@dataclass(frozen=True)
class Potential(ABC):
    """A strictly convex φ(r) = Σ_e f(r_e) of relative loads r in [0, E]. Computes in fp32 (fp64 if the input is)."""

    name: str  # its key in POTENTIALS
    value: float  # its parameter

    @property
    def floor(self) -> float:
        """The relative load below which f is a line."""
        return 0.0

    def phi(self, r: Tensor) -> Tensor:
        """Returns φ(r), shape `(...)`, of relative loads `r (..., E)`. It is 0 at balance and positive elsewhere."""
        r = _at_least_fp32(r)
        inside = r.clamp(min=self.floor)
        return (self._f(inside) + self._slope(inside).detach() * (r - inside)).sum(dim=-1)

    def grad(self, r: Tensor) -> Tensor:
        """Returns ∇φ(r) = f'(r_e), shape `(..., E)`, of relative loads `r (..., E)`. It is finite at 0."""
        return self._slope(_at_least_fp32(r).clamp(min=self.floor))

    @abstractmethod
    def _f(self, r: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, r: Tensor) -> Tensor: ...


class Power(Potential):
    """f(r) = (r^a - 1 - a (r - 1)) / (a (a - 1)), with limits at a = 0 and a = 1 (Cressie-Read power divergences)."""

    @property
    def floor(self) -> float:
        steepness = 1.0 - self.value
        if steepness <= 0:
            return MIN_RELATIVE_LOAD
        return max(MIN_RELATIVE_LOAD, (1.0 + steepness * MAX_DISCOUNT) ** (-1.0 / steepness))

    def _f(self, r: Tensor) -> Tensor:
        return r * _box_cox(r, self.value - 1.0) - _box_cox(r, self.value)

    def _slope(self, r: Tensor) -> Tensor:
        return _box_cox(r, self.value - 1.0)


class PseudoHuber(Potential):
    """f(r) = w² (√(1 + x²) - 1) with x = (r - 1) / w and width w. Prices lie between -w and w."""

    def _f(self, r: Tensor) -> Tensor:
        return (r - 1.0).square() / (1.0 + self._stretch(r))

    def _slope(self, r: Tensor) -> Tensor:
        return (r - 1.0) / self._stretch(r)

    def _stretch(self, r: Tensor) -> Tensor:
        return (1.0 + ((r - 1.0) / self.value).square()).sqrt()


class LogCosh(Potential):
    """f(r) = w² log cosh((r - 1) / w) with width w. Prices lie between -w and w."""

    def _f(self, r: Tensor) -> Tensor:
        x = (r - 1.0) / self.value
        return self.value**2 * (torch.logaddexp(x, -x) - math.log(2.0))

    def _slope(self, r: Tensor) -> Tensor:
        return self.value * ((r - 1.0) / self.value).tanh()


def softplus(name: str, delta: float) -> LogCosh:
    """4δ² softplus((r - 1) / δ) without its linear term (an equal price for all experts): a log-cosh of width 2δ."""
    return LogCosh(name, 2.0 * delta)


@dataclass(frozen=True)
class Variant:
    """A row of [`POTENTIALS`]. Call it to build the potential."""

    family: str  # "entropy", "norm" or "robust", as in the paper's ablation
    kind: Callable[[str, float], Potential]  # builds the potential from name and value
    default: float
    parameter: str | None = None  # its name in `potential_kwargs`; None if the value is fixed
    low: float = -math.inf  # range of the parameter, ends included
    high: float = math.inf

    def __call__(self, name: str, /, **kwargs: float) -> Potential:
        takes = f"`{self.parameter}` in [{self.low:g}, {self.high:g}]" if self.parameter else "no parameter"
        if unknown := sorted(kwargs.keys() - {self.parameter}):
            raise ValueError(
                f"`potential_kwargs` has unknown keys {unknown!r:.200}: the potential {name!r} takes {takes}."
            )
        value = next(iter(kwargs.values()), self.default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            raise ValueError(
                f"`potential_kwargs` has {self.parameter} = {value!r:.200}: the potential {name!r} takes {takes}, "
                f"{self.default:g} if left out."
            )
        return self.kind(name, float(value))


# Comments give f up to terms that are constant on the simplex. Powers up to 10 keep φ finite in fp32 for 4096 experts.
POTENTIALS: dict[str, Variant] = {
    "neg_entropy": Variant("entropy", Power, 1.0),  # r log r: Shannon, which the paper recommends
    "tsallis": Variant("entropy", Power, 1.1, "alpha", 0.0, 10.0),  # r^a / (a (a - 1)); the paper has a = 1.1
    "hellinger": Variant("entropy", Power, 0.5),  # -4 √r
    "log_barrier": Variant("entropy", Power, 0.0),  # -log r: Burg, hardest on dead experts
    "lp": Variant("norm", Power, 2.0, "p", 1.01, 10.0),  # r^p / (p (p - 1))
    "l2": Variant("norm", Power, 2.0),
    "l3": Variant("norm", Power, 3.0),
    "pseudo_huber": Variant("robust", PseudoHuber, 1.0, "delta", 0.01, 100.0),
    "log_cosh": Variant("robust", LogCosh, 1.0, "delta", 0.01, 100.0),
    "softplus": Variant("robust", softplus, 1.0, "delta", 0.01, 100.0),
}


def get_potential(name: str, /, **kwargs: float) -> Potential:
    """
    Builds a potential by name.

    Args:
        name (`str`): A key of [`POTENTIALS`].
        kwargs (`float`, *optional*): Its parameter: `alpha` of tsallis, `p` of lp, `delta` of the robust ones.

    Raises:
        ValueError: If the name or a parameter is unknown, or a value is out of its range.
    """
    if not isinstance(name, str) or name not in POTENTIALS:
        raise ValueError(f"`potential` must be one of {', '.join(map(repr, POTENTIALS))}, got {name!r:.200}.")
    return POTENTIALS[name](name, **kwargs)


def centred_price(potential: Potential, mean: Tensor) -> Tensor:
    """
    Returns the expert prices q = ∇φ(E·m) of arXiv 2605.15403, Algorithm 1, minus their mean over the experts.

    Probabilities sum to one, so a constant added to all prices changes no routing gradient. A positive centred price
    means a load above that of most experts. Centred prices are comparable between layers and runs.

    Args:
        potential (`Potential`): φ.
        mean (`torch.Tensor` of shape `(..., E)`): Mean routing probabilities m, or load shares. Rows sum to one.

    Returns:
        `torch.Tensor` of shape `(..., E)`: Prices that sum to zero over the experts, without a gradient.
    """
    price = potential.grad(_at_least_fp32(mean.detach()) * mean.shape[-1])
    return price - price.mean(dim=-1, keepdim=True)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _box_cox(r: Tensor, power: float) -> Tensor:
    """(r^power - 1) / power, and log r at power 0. Exact to rounding near 0."""
    return r.log() if power == 0 else torch.expm1(power * r.log()) / power
