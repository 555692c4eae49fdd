from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster_router.console.counts import SECONDS, Counts, ended, progress
from cluster_router.wire.types import Adaptation


def test_streams_add_up(told: Any) -> None:
    ends = [told.end(), told.end(cluster=None), told.end(adaptation=Adaptation("off"))]
    counts = Counts.of([*map(ended, ends), progress(output_tokens=25, errors=1)])
    assert counts.requests == 3
    assert counts.modes == {"cluster": 1, "static": 1, "off": 1}
    assert (counts.prompt_tokens, counts.cached_tokens) == (300, 120)
    assert (counts.output_tokens, counts.errors) == (25, 1)


def test_of_nothing_there_are_no_quantiles(told: Any) -> None:
    assert Counts.of([]).first_token_s(0.5) is None
    assert Counts.of([ended(told.end(adaptation=Adaptation("off")))]).similarity(0.5) is None


def test_a_stream_without_a_token_has_no_latency(told: Any) -> None:
    counts = Counts.of([ended(told.end(first_token_s=None))])
    assert counts.requests == 1 and counts.first_token_s(0.5) is None


def test_latencies_are_within_a_bin(told: Any) -> None:
    seconds = np.random.default_rng(0).lognormal(-1, 1, 2000)
    counts = Counts.of(ended(told.end(first_token_s=one)) for one in seconds)
    for share in (0.5, 0.95):
        assert counts.first_token_s(share) == pytest.approx(np.quantile(seconds, share), rel=0.21)


def test_similarities_are_within_a_bin(told: Any) -> None:
    cosines = np.random.default_rng(0).uniform(0.7, 1.0, 2000)
    counts = Counts.of(
        ended(told.end(adaptation=Adaptation("cluster", 3, float(one)))) for one in cosines
    )
    assert counts.similarity(0.5) == pytest.approx(np.quantile(cosines, 0.5), abs=0.011)
    assert counts.similarities.sum() == 2000


@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-9])
def test_what_takes_no_time_is_counted_in_the_first_bin(value: float, told: Any) -> None:
    found = Counts.of([ended(told.end(first_token_s=value))]).first_token_s(0.5)
    assert found is not None and 0 < found < SECONDS[0]


@pytest.mark.parametrize("value", [240.0, 1e9])
def test_what_takes_longer_than_all_bins_is_counted_in_the_last(value: float, told: Any) -> None:
    found = Counts.of([ended(told.end(first_token_s=value))]).first_token_s(0.5)
    assert found is not None and SECONDS[-2] < found < SECONDS[-1]


@pytest.mark.parametrize(
    ("value", "place"), [(-1.0, 0), (0.0, 0), (0.2, 0), (1.0, -1), (1.0000001, -1)]
)
def test_cosines_outside_too(value: float, place: int, told: Any) -> None:
    counts = Counts.of([ended(told.end(adaptation=Adaptation("cluster", 3, value)))])
    assert counts.similarities.sum() == counts.similarities[place] == 1
