"""The paired bootstrap."""

from __future__ import annotations

import numpy as np
import pytest

from training.statistics import Bootstrap


def test_the_estimate_is_the_token_weighted_mean() -> None:
    bootstrap = Bootstrap(["a", "a", "b"], [10, 30, 5], resamples=200, seed=0)
    sums = np.array([1.0, 6.0, 2.0])
    assert bootstrap.domain("a", sums).estimate == pytest.approx(7 / 40)
    assert bootstrap.mean(sums).estimate == pytest.approx((7 / 40 + 2 / 5) / 2)


def test_the_interval_is_that_of_the_mean() -> None:
    random = np.random.default_rng(0)
    sums = random.normal(1.0, 2.0, 400)
    interval = Bootstrap(["a"] * 400, [1] * 400, resamples=4000, seed=1).domain("a", sums)
    expected = 1.96 * sums.std() / 20
    assert interval.high - interval.estimate == pytest.approx(expected, rel=0.1)
    assert interval.estimate - interval.low == pytest.approx(expected, rel=0.1)


def test_equal_differences_leave_no_doubt() -> None:
    interval = Bootstrap(["a"] * 5, [4] * 5, resamples=100, seed=0).domain("a", np.full(5, 0.8))
    assert (interval.low, interval.high) == (pytest.approx(0.2), pytest.approx(0.2))
