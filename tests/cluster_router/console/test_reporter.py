"""A real router reports what it serves to a real board."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from cluster_router.clusters import Assigner
from cluster_router.console.board import StatusBoard
from cluster_router.console.increments import Increments
from cluster_router.console.layout import ClusterMap
from cluster_router.console.reporter import RouterReporter
from cluster_router.console.reports import ClusterTable, Place, RouterReport
from cluster_router.console.view import Viewer, state_of
from cluster_router.index import FaissIndex
from cluster_router.tenants import TenantAssigners
from cluster_router.traffic import Traffic
from cluster_router.wire.errors import UnavailableError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import Assignment, SamplingParams, TokenChunk, TokenizedRequest


class LocalBoard:
    """A board in this process, behind the calls of a remote one."""

    def __init__(self) -> None:
        self.board = StatusBoard()
        self.tables = 0

    async def hear_router(self, place: Place, report: RouterReport) -> list[str]:
        return self.board.hear_router(place, report)

    async def hear_table(self, table: ClusterTable) -> None:
        self.tables += 1
        self.board.hear_table(table)


def snapshot(version: int = 1) -> ClusterSnapshot:
    return ClusterSnapshot(
        version=version,
        ids=np.array([3, 8]),
        centroids=np.eye(2, 4, dtype=np.float32),
        sizes=np.array([100, 7]),
        versions=np.array([1, 1]),
        conditioning=np.zeros((2, 4), np.float32),
        mean=np.zeros(4, np.float32),
        threshold=0.9,
    )


class Stage:
    def __init__(self) -> None:
        self.increments = Increments()
        self.traffic = Traffic(listeners=(self.increments.listen,))
        self.assigners = TenantAssigners(lambda _: Assigner(snapshot(), FaissIndex, "base", "h"))
        self.board = LocalBoard()
        self.reporter = RouterReporter(
            Place("router-1", "n"),
            self.board,
            self.traffic,
            self.increments,
            self.assigners,
            ClusterMap(snapshot().centroids, snapshot().mean),
        )

    def stream(self, cluster: int | None = 3, namespace: str = "", tokens: int = 4) -> None:
        """One stream from its begin to its end."""
        request = TokenizedRequest(
            "r", (1, 2, 3), SamplingParams(), Assignment(None, cluster, 0.95), namespace
        )
        flight = self.traffic.begin(request)
        flight.chunk(TokenChunk("r", tokens=(1,) * tokens, finish_reason="stop", cached_tokens=2))
        flight.end()

    def state(self, viewer: Viewer | None = None) -> dict:
        return state_of(self.board.board, viewer or Viewer())


@pytest.fixture
async def stage() -> Stage:
    return Stage()


async def test_what_is_served_is_told_once(stage: Stage) -> None:
    stage.stream()
    await stage.reporter.report()
    await stage.reporter.report()
    stage.stream(cluster=None)
    await stage.reporter.report()
    totals = stage.state()["totals"]
    assert totals["requests_recent"] == 2
    assert totals["cached_share"] == pytest.approx(4 / 6, abs=1e-3)
    counts = stage.board.board.history.by_key(stage.board.board.clock(), 100, lambda _: True)
    assert sum(one.output_tokens for one in counts.values()) == 8


async def test_tokens_count_while_they_stream(stage: Stage) -> None:
    request = TokenizedRequest("r", (1,), SamplingParams(), Assignment(None, 3, 0.95))
    flight = stage.traffic.begin(request)
    flight.chunk(TokenChunk("r", tokens=(1, 2)))
    await stage.reporter.report()
    flight.chunk(TokenChunk("r", tokens=(1, 2, 3)))
    await stage.reporter.report()
    state = stage.state()
    assert state["top"][0]["id"] == 3
    assert state["totals"]["requests_recent"] == 0
    assert state["replicas"]["routers"][0]["in_flight"] == 1


async def test_tables_go_when_they_are_wanted(stage: Stage) -> None:
    for _ in range(3):
        await stage.reporter.report()
    assert stage.board.tables == 1
    stage.assigners.of("").swap(snapshot(2))
    stage.assigners.of("shop")
    await stage.reporter.report()
    assert stage.board.tables == 3
    assert [one["name"] for one in stage.state()["namespaces"]] == ["", "shop"]
    points = {(one["x"], one["y"]) for one in stage.state()["clusters"]}
    assert len(points) == 2


async def test_clusters_are_named_in_a_thread(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_in: list[int] = []
    table = Assigner.table

    def noted(assigner: Assigner) -> object:
        named_in.append(threading.get_ident())
        return table(assigner)

    monkeypatch.setattr(Assigner, "table", noted)
    await stage.reporter.report()
    assert len(named_in) == 1 and threading.get_ident() not in named_in


async def test_refusals_count_as_errors(stage: Stage) -> None:
    stage.traffic.refused("", UnavailableError("no"))
    await stage.reporter.report()
    assert stage.state()["totals"]["errors_recent"] == 1
