"""Straight lines through measurements: exponents with intervals, and power law against exponential."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Line:
    """log y = intercept + slope * x (an exponential) or slope * log x (a power law)."""

    slope: float
    low: float  # 95 % interval of the slope, as if the residuals were independent
    high: float
    intercept: float
    residual: float  # root mean square of log y about the line

    def __str__(self) -> str:
        return f"{self.slope:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def line(x: Sequence[float], log_y: Sequence[float]) -> Line:
    """Least squares; ValueError for fewer than three points or only one abscissa."""
    if len(x) < 3 or max(x) == min(x):
        raise ValueError(f"a line with an interval needs three points at two places, got {len(x)} points")
    x_, y_ = np.asarray(x, float), np.asarray(log_y, float)
    slope, intercept = np.polyfit(x_, y_, 1)
    squares = float(np.square(y_ - intercept - slope * x_).sum())
    freedom = len(x) - 2
    error = math.sqrt(squares / freedom / float(np.square(x_ - x_.mean()).sum()))
    half = student(freedom) * error
    return Line(float(slope), float(slope - half), float(slope + half), float(intercept), math.sqrt(squares / len(x)))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t to within 0.01: a table, then the expansion about the normal's."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    z = 1.959964
    series = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    series += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return table.get(freedom, series)


def power_law(x: Sequence[float], y: Sequence[float]) -> Line:
    return line([math.log(v) for v in x], [math.log(v) for v in y])


def exponential(x: Sequence[float], y: Sequence[float]) -> Line:
    return line(x, [math.log(v) for v in y])


def compare(x: Sequence[float], y: Sequence[float]) -> tuple[str, Line, Line]:
    """Power law or exponential, two parameters each: a verdict in words, and the two lines.

    A law fits where it is off by less than a factor e^0.25 (root mean square) and the other by 1.5 times as much in the
    logarithm.
    """
    power, exp = power_law(x, y), exponential(x, y)
    near, far = sorted((power.residual, exp.residual))
    name = "power law" if near == power.residual else "exponential"
    if far < 1.5 * near:
        return "neither law is clearly nearer", power, exp
    return (f"{name} fits" if near < 0.25 else f"{name} nearer, but poor"), power, exp
