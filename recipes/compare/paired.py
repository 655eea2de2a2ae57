"""Means and spreads over seeds, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


# Two-sided 95% quantiles of Student's t by degrees of freedom, for up to 25 pairs; beyond, 2, which is not far off.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179),
    *(2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064),
)


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1; `nan` for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def spread_of(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation, in print."""
    mean, spread = mean_spread(values)
    return f"{mean:{form}}" if math.isnan(spread) else f"{mean:{form}} ± {spread:{form}}"


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, float, bool]:
    """
    Mean and sample standard deviation of `values[seed] - baseline[seed]` over the seeds that both have, and whether the
    mean is further from 0 than a two-sided t-test at 5% allows for (never with a single seed).

    Raises:
        ValueError: if they have no seed in common.
    """
    differences = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    if not differences:
        raise ValueError("the two have no seed in common, there is nothing to pair.")
    mean, spread = mean_spread(differences)
    count = len(differences)
    return mean, spread, is_told(mean, spread, count)


def is_told(mean: float, spread: float, count: int) -> bool:
    """Whether the mean of `count` values with this standard deviation is told from 0 by a two-sided t-test at 5%."""
    if count < 2:
        return False
    quantile = T95[count - 2] if count - 2 < len(T95) else 2.0
    return abs(mean) > quantile * spread / math.sqrt(count)
