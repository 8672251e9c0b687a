"""Measurements of `frontier --pairs`, and what is said of several of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

POPULATION = math.inf  # pairs, where preferences are exact


class Point(NamedTuple):
    """One measurement: gap in nats of one method, for N pairs and one data set."""

    world: str
    method: str
    pairs: float
    gap: float


class Spread(NamedTuple):
    """Of the gaps of one method at one number of pairs: quartiles, and the mean, which the law is about."""

    low: float
    median: float
    high: float
    mean: float


def spreads(points: list[Point], world: str, method: str) -> dict[float, Spread]:
    """For each number of pairs, increasing. A few unlucky data sets may carry a mean, hence the median."""
    gaps: dict[float, list[float]] = {}
    for point in points:
        if (point.world, point.method) == (world, method):
            gaps.setdefault(point.pairs, []).append(point.gap)
    return {n: Spread(*np.quantile(gaps[n], (0.25, 0.5, 0.75)), np.mean(gaps[n])) for n in sorted(gaps)}
