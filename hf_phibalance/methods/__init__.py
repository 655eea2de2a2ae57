"""
The balancing methods: φ-balancing, and those it is compared with.

| module | what it holds |
|---|---|
| `table` | the fields of [`PhiBalanceConfig`] that each method sets |
| `prices` | prices of the step under way, for methods that do not take those of the previous one |
| `biases` | how a step moves the selection bias |
"""

from .biases import bias_step
from .prices import price_now
from .table import METHODS, PHI_DEFAULTS, Method


__all__ = ["METHODS", "PHI_DEFAULTS", "Method", "bias_step", "price_now"]
