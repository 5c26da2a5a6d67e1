"""Fits of known curves."""

import math

import numpy as np
import pytest

from ntk_attention.theory import fits

X = [2.0**k for k in range(10)]


def test_exact_laws():
    assert fits.power_law(X, [3 * x**-0.5 for x in X]).slope == pytest.approx(-0.5)
    assert fits.exponential(X, [3 * math.exp(-x / 7) for x in X]).slope == pytest.approx(-1 / 7)


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042)])
def test_student(freedom, quantile):
    assert fits.student(freedom) == pytest.approx(quantile, abs=0.01)


def test_interval_covers():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        fit = fits.power_law(X, [x**-0.5 * math.exp(generator.normal(0, 0.3)) for x in X])
        covered += fit.low <= -0.5 <= fit.high
    assert 0.93 < covered / 1000 < 0.97


def test_compare():
    assert fits.compare(X, [x**-0.5 for x in X])[0] == "power law fits"
    assert fits.compare(X, [math.exp(-x / 100) for x in X])[0] == "exponential fits"
    assert fits.compare(X, [x**-0.5 * math.exp((-1) ** i) for i, x in enumerate(X)])[0].startswith("neither")
    assert fits.compare(X, [x**-2 * math.exp(0.5 * (-1) ** i) for i, x in enumerate(X)])[0].endswith("but poor")


def test_error():
    with pytest.raises(ValueError, match="got 2 points"):
        fits.power_law([1, 2], [1, 2])
