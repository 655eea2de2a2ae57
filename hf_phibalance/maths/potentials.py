"""Potentials: the convex functions whose gradient prices the experts.

φ-balancing (arXiv 2605.15403) minimises φ(mean routing probability) for a strictly convex, symmetric φ, whose only
minimum on the simplex is the uniform distribution (Lemma 1). By convex duality the gradient of φ is a vector of expert
prices, q = ∇φ(m) (Algorithm 1). This module holds the potentials and nothing else: tensors in, tensors out.

Three conventions make prices comparable between potentials and numbers of experts:

- φ acts on the *relative load* r = E·m, which is 1 for every expert at balance.
- φ(r) = Σ_e f(r_e) with f(1) = f'(1) = 0 and f''(1) = 1. The first two drop terms that are constant on the simplex,
  the third is a choice of unit. So near balance every potential prices an expert at r_e - 1; they differ only far from it.
- Below `floor`, f goes on along its tangent: φ stays convex and differentiable, and ∇φ is finite at a load of 0.

In these units some named potentials coincide: entropies and norms are one family of powers ("tsallis" with alpha 0,
0.5, 1, 2, 3 is "log_barrier", "hellinger", "neg_entropy", "l2", "l3"), and "softplus" is a wider "log_cosh".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


Family = Literal["entropy", "norm", "robust"]

# A millionth of the fair share is dead: log(1e-6) = -13.8, and a mean of fp32 probabilities still resolves it ...
MIN_RELATIVE_LOAD = 1e-6
# ... but f' may diverge faster than log; there the floor is raised so that no price falls below minus this.
MAX_DISCOUNT = 100.0


@dataclass(frozen=True)
class Potential(ABC):
    """
    A separable, strictly convex, symmetric, differentiable φ(r) = Σ_e f(r_e) of relative loads r in [0, E].

    Subclasses give f, its slope, its conjugate and the inverse of its slope, elementwise and in closed form. All is
    computed and returned in fp32, or in fp64 where the input is.

    Args:
        name (`str`): Its key in [`POTENTIALS`].
        family (`str`): `"entropy"`, `"norm"` or `"robust"`, the families of the paper's ablation.
    """

    name: str
    family: Family

    @property
    @abstractmethod
    def floor(self) -> float:
        """The relative load below which f is a line."""

    @property
    @abstractmethod
    def price_limit(self) -> float:
        """The supremum of f', which prices approach under overload."""

    def phi(self, r: Tensor) -> Tensor:
        """φ(r), shape `(...)`, of relative loads `r (..., E)`; 0 at balance, positive elsewhere."""
        r = _at_least_fp32(r)
        inside = r.clamp(min=self.floor)
        return (self._f(inside) + self._slope(inside).detach() * (r - inside)).sum(dim=-1)

    def grad(self, r: Tensor) -> Tensor:
        """∇φ(r) = f'(r_e), shape `(..., E)`, of relative loads `r (..., E)`; finite at 0."""
        return self._slope(_at_least_fp32(r).clamp(min=self.floor))

    def conjugate(self, q: Tensor) -> Tensor:
        """φ*(q) = max_{r ≥ 0} ⟨r, q⟩ - φ(r), shape `(...)`, of prices `q (..., E)`; `inf` beyond `price_limit`."""
        q = self._at_least_floor_price(q)
        return self._conjugate(q).masked_fill(q > self.price_limit, math.inf).sum(dim=-1)

    def grad_conjugate(self, q: Tensor) -> Tensor:
        """∇φ*(q), shape `(..., E)`: the relative loads whose prices are `q`, those under the floor raised to it."""
        q = self._at_least_floor_price(q)
        return self._inverse_slope(q).masked_fill(q > self.price_limit, math.inf)

    def _at_least_floor_price(self, q: Tensor) -> Tensor:
        # f is a line below the floor, so f* is constant below the floor's price
        q = _at_least_fp32(q)
        return q.maximum(self._slope(q.new_full((), self.floor)))

    @abstractmethod
    def _f(self, r: Tensor) -> Tensor: ...

    @abstractmethod
    def _slope(self, r: Tensor) -> Tensor: ...

    @abstractmethod
    def _conjugate(self, q: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse_slope(self, q: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Power(Potential):
    """
    f(r) = (r^a - 1 - a (r - 1)) / (a (a - 1)) with its limits at a = 0 and a = 1 (Cressie-Read power divergences).

    Its price is (r^(a-1) - 1) / (a - 1), and log r at a = 1: unbounded under overload if a ≥ 1, else < 1 / (1 - a).
    """

    exponent: float

    @property
    def floor(self) -> float:
        steepness = 1.0 - self.exponent
        if steepness <= 0:
            return MIN_RELATIVE_LOAD
        return max(MIN_RELATIVE_LOAD, (1.0 + steepness * MAX_DISCOUNT) ** (-1.0 / steepness))

    @property
    def price_limit(self) -> float:
        return 1.0 / (1.0 - self.exponent) if self.exponent < 1 else math.inf

    def _f(self, r: Tensor) -> Tensor:
        return r * _box_cox(r, self.exponent - 1.0) - _box_cox(r, self.exponent)

    def _slope(self, r: Tensor) -> Tensor:
        return _box_cox(r, self.exponent - 1.0)

    def _conjugate(self, q: Tensor) -> Tensor:
        return _box_cox(self._inverse_slope(q), self.exponent)

    def _inverse_slope(self, q: Tensor) -> Tensor:
        power = self.exponent - 1.0
        return q.exp() if power == 0 else ((power * q).clamp(min=-1.0).log1p() / power).exp()


@dataclass(frozen=True)
class Robust(Potential):
    """
    f(r) = w² h((r - 1) / w) with h quadratic near 0 and linear far away: prices stay between -w and w.

    Any convex f has its minimum on the simplex at uniform, but only a function of the deviation r - 1 bends from
    quadratic to linear at a distance `width` from balance, rather than from an empty expert.
    """

    width: float

    @property
    def floor(self) -> float:
        return 0.0

    @property
    def price_limit(self) -> float:
        return self.width


@dataclass(frozen=True)
class PseudoHuber(Robust):
    """h(x) = √(1 + x²) - 1; the price of a deviation d is d / √(1 + (d / w)²)."""

    def _f(self, r: Tensor) -> Tensor:
        return (r - 1.0).square() / (1.0 + self._stretch(r))

    def _slope(self, r: Tensor) -> Tensor:
        return (r - 1.0) / self._stretch(r)

    def _conjugate(self, q: Tensor) -> Tensor:
        return q + q.square() / (1.0 + self._shrink(q))

    def _inverse_slope(self, q: Tensor) -> Tensor:
        return 1.0 + q / self._shrink(q)

    def _stretch(self, r: Tensor) -> Tensor:
        return (1.0 + ((r - 1.0) / self.width).square()).sqrt()

    def _shrink(self, q: Tensor) -> Tensor:
        return (1.0 - (q / self.width).square()).sqrt()


@dataclass(frozen=True)
class LogCosh(Robust):
    """h(x) = log cosh x; the price of a deviation d is w tanh(d / w)."""

    def _f(self, r: Tensor) -> Tensor:
        x = (r - 1.0) / self.width
        return self.width**2 * (torch.logaddexp(x, -x) - math.log(2.0))

    def _slope(self, r: Tensor) -> Tensor:
        return self.width * ((r - 1.0) / self.width).tanh()

    def _conjugate(self, q: Tensor) -> Tensor:
        u = q / self.width
        return q + 0.5 * self.width**2 * (torch.special.xlog1py(1.0 + u, u) + torch.special.xlog1py(1.0 - u, -u))

    def _inverse_slope(self, q: Tensor) -> Tensor:
        return 1.0 + self.width * (q / self.width).atanh()


def softplus(name: str, family: Family, delta: float) -> LogCosh:
    """4δ² softplus((r - 1) / δ), of price 4δ sigmoid((r - 1) / δ), less the linear term that charges all alike."""
    return LogCosh(name, family, 2.0 * delta)


@dataclass(frozen=True)
class Variant:
    """
    A named potential, and the factory of it: call it with its parameter, if it has one.

    Args:
        family (`str`): The family of the paper's ablation.
        kind (`Callable`): Builds the potential from name, family and value.
        default (`float`): The value, or the default of the parameter.
        parameter (`str`, *optional*): What users call the value; a variant without is fixed.
        low, high (`float`, *optional*): The range of the parameter, ends included.
    """

    family: Family
    kind: Callable[[str, Family, float], Potential]
    default: float
    parameter: str | None = None
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, name: str, /, **kwargs: float) -> Potential:
        takes = f"`{self.parameter}` in [{self.low:g}, {self.high:g}]" if self.parameter else "no parameter"
        if unknown := sorted(kwargs.keys() - {self.parameter}):
            raise ValueError(
                f"`potential_kwargs` has unknown keys {unknown!r:.200}: the potential {name!r} takes {takes}."
            )
        value = kwargs.get(self.parameter, self.default) if self.parameter else self.default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            raise ValueError(
                f"`potential_kwargs` has {self.parameter} = {value!r:.200}: the potential {name!r} takes {takes}, "
                f"{self.default:g} if left out."
            )
        return self.kind(name, self.family, float(value))


# The comments give f up to terms constant on the simplex. Powers up to 10 keep φ finite in fp32 for 4096 experts.
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
    Build a potential by name.

    Args:
        name (`str`): A key of [`POTENTIALS`].
        kwargs (`float`, *optional*): Its parameter: `alpha` of tsallis, `p` of lp, `delta` of the robust ones.

    Raises:
        ValueError: if the name or a parameter is unknown, or a value is out of its range.
    """
    if not isinstance(name, str) or name not in POTENTIALS:
        raise ValueError(f"`potential` must be one of {', '.join(map(repr, POTENTIALS))}, got {name!r:.200}.")
    return POTENTIALS[name](name, **kwargs)


def centred_price(potential: Potential, mean: Tensor) -> Tensor:
    """
    Expert prices q = ∇φ(E·m) of arXiv 2605.15403, Algorithm 1, less their mean over the experts.

    Probabilities sum to one, so a constant added to all prices changes no routing gradient. Centred, a positive price
    means a load above what most experts have, and prices are comparable between layers and runs.

    Args:
        potential (`Potential`): What prices the load.
        mean (`torch.Tensor` of shape `(..., E)`): Mean routing probabilities m, or load shares; rows sum to one.

    Returns:
        `torch.Tensor` of shape `(..., E)`: prices that sum to zero over the experts, constants to autograd.
    """
    price = potential.grad(_at_least_fp32(mean.detach()) * mean.shape[-1])
    return price - price.mean(dim=-1, keepdim=True)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _box_cox(r: Tensor, power: float) -> Tensor:
    """(r^power - 1) / power, and log r at power 0; exact to rounding near it."""
    return r.log() if power == 0 else torch.expm1(power * r.log()) / power
