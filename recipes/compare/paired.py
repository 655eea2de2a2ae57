"""Means and spreads over seeds, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence


# Two-sided 95% quantiles of Student's t by degrees of freedom, for up to ten seeds; a normal distribution beyond.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (divided by n - 1; `nan` for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


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
    if count < 2:
        return mean, spread, False
    quantile = T95[count - 2] if count - 2 < len(T95) else 1.96
    return mean, spread, abs(mean) > quantile * spread / math.sqrt(count)
