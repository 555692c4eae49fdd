"""Labels stay bounded, and counters only grow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import pytest

from cluster_router.traffic import Traffic
from cluster_router.wire.errors import UnavailableError
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    SamplingParams,
    TokenChunk,
    TokenizedRequest,
)
from deploy.metrics import NONE, OTHER, Meters
from deploy.reporting import TrafficReporter, report_every


class RecordingMeters(Meters):
    """Adds up in memory what Ray would export."""

    def __init__(self) -> None:
        super().__init__("ClusterRouter")
        self.values: dict[tuple[str, ...], float] = {}

    def count(self, name: str, amount: float, labels: Mapping[str, str] | None = None) -> None:
        if amount > 0:
            place = (name, *(labels or {}).values())
            self.values[place] = self.values.get(place, 0) + amount

    def set(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        self.values[name, *(labels or {}).values()] = value

    def observe(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        self.count(f"{name}_count", 1, labels)


@pytest.fixture
def meters() -> RecordingMeters:
    return RecordingMeters()


def stream(traffic: Traffic, cluster: int | None, namespace: str = "") -> None:
    assignment = Assignment(AdapterKey("base", "hyper", cluster, 1), cluster, 0.5)
    request = TokenizedRequest("r", (1, 2), SamplingParams(), assignment, namespace=namespace)
    flight = traffic.begin(request)
    flight.chunk(TokenChunk("r", tokens=(1,)))
    flight.chunk(TokenChunk("r", tokens=(2,), finish_reason="stop"))
    flight.end()


def test_only_so_many_clusters_have_labels_of_their_own(meters: RecordingMeters) -> None:
    reporter = TrafficReporter(3, meters)
    traffic = Traffic(listeners=[reporter.ended])
    for cluster in (1, None, 2, 3, 4, 1, 3):
        stream(traffic, cluster)
    counted = {place[1:]: n for place, n in meters.values.items() if place[0] == "requests"}
    assert counted == {
        (NONE, "1", "cluster"): 2,
        (NONE, NONE, "static"): 1,
        (NONE, "2", "cluster"): 1,
        (OTHER, OTHER, "cluster"): 3,
    }
    assert meters.values["output_tokens", OTHER, OTHER] == 6
    assert meters.values["first_token_seconds_count", "cluster"] == 6
    for cluster in (2, 4):
        traffic.gained("", cluster, 0.25)
    reporter.report(traffic)
    gains = [place for place in meters.values if place[0] == "conditioning_gain_nats"]
    assert gains == [("conditioning_gain_nats", NONE, "2")], "a mean over others says nothing"


def test_totals_are_brought_up_to_date(meters: RecordingMeters) -> None:
    reporter, traffic = TrafficReporter(3, meters), Traffic()
    for _ in range(2):
        traffic.refused("", ValueError())
        reporter.report(traffic)
        reporter.report(traffic)
    assert meters.values["errors", "internal_error"] == 2
    assert meters.values["streams_in_flight",] == 0


def test_the_tables_meters_are_made_and_refuse_what_is_not_in_it() -> None:
    meters = Meters("LMReplica")
    meters.set("running_requests", 1)
    meters.total("preemptions", 0)
    with pytest.raises(KeyError):
        meters.set("streams_in_flight", 1)


async def test_reports_that_fail_cost_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    calls = asyncio.Event()
    asked = 0

    async def failing() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            calls.set()
        raise UnavailableError("no board")

    reporting = asyncio.create_task(report_every(0.001, failing))
    await asyncio.wait_for(calls.wait(), 10)
    reporting.cancel()
    [warning] = caplog.messages
    assert "failing" in warning
