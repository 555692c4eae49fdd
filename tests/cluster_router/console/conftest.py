"""A board whose clock stands still unless moved, and routers that report to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cluster_router.console.board import StatusBoard
from cluster_router.console.counts import ended, progress
from cluster_router.console.increments import Increment
from cluster_router.console.reports import ClusterTable, Place, RouterReport
from cluster_router.console.view import Viewer, state_of
from cluster_router.tally import Key, Rate, StreamEnd
from cluster_router.wire.types import Adaptation, ClusterInfo


def end(namespace: str = "", cluster: int | None = 3, **changes: Any) -> StreamEnd:
    """A stream of 100 prompt tokens, 40 of them cached, whose first token took 0.2 s."""
    known: dict[str, Any] = {
        "request_id": "r",
        "namespace": namespace,
        "adaptation": Adaptation("static" if cluster is None else "cluster", cluster, 0.95),
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "output_tokens": 10,
        "first_token_s": 0.2,
        "token_gap_s": None,
        "longest_gap_s": None,
        "seconds": 1.0,
        "finish_reason": "stop",
        "error": None,
    }
    return StreamEnd(**(known | changes))


def table(namespace: str = "", version: int = 1, sizes: dict[int, int] | None = None) -> Any:
    sizes = {3: 100, 8: 7} if sizes is None else sizes
    clusters = tuple(
        ClusterInfo(id, size, version, f"key{id}", 0, ("sql", "select") if size >= 20 else ())
        for id, size in sizes.items()
    )
    return ClusterTable(namespace, version, clusters, np.zeros((len(clusters), 2)))


@dataclass
class Told:
    """A board, and the time on its clock."""

    now: float = 1000.0
    end = staticmethod(end)
    table = staticmethod(table)
    board: StatusBoard = field(init=False)

    def __post_init__(self) -> None:
        self.board = StatusBoard(lambda: self.now, lambda: 1.7e9 + self.now)

    def served(self, *ends: StreamEnd, router: str = "router-1", version: int = 1) -> list[str]:
        """A router reports streams, with ten tokens of output for each."""
        counts: dict[Key, Any] = {}
        for one in ends:
            key = Key(one.namespace, one.adaptation.cluster)
            counts[key] = counts.get(key, 0) + ended(one) + progress(one.output_tokens, 0)
        increment = Increment(2, Rate(1.5), tuple(counts.items()))
        return self.board.hear_router(
            Place(router, "10.0.0.1"), RouterReport(increment, {"": version})
        )

    def state(self, **viewer: Any) -> dict[str, Any]:
        return state_of(self.board, Viewer(**viewer))


@pytest.fixture
def told() -> Told:
    return Told()
