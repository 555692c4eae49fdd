"""RouterReporter: a router's side of the board. What it tells, and when, at nobody's cost."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from cluster_router.console.increments import Increments
from cluster_router.console.layout import ClusterMap, Points
from cluster_router.console.reports import ClusterTable, Place, RouterReport
from cluster_router.traffic import Traffic

# It brings FAISS and torch with it, which the board does without.
if TYPE_CHECKING:
    from cluster_router.tenants import TenantAssigners

PERIOD_S = 1.0


class Board(Protocol):
    """A StatusBoard, or a handle to one."""

    async def hear_router(self, place: Place, report: RouterReport) -> list[str]:
        """See StatusBoard."""
        ...

    async def hear_table(self, table: ClusterTable) -> None:
        """See StatusBoard."""
        ...


class RouterReporter:
    """Tells a board each second what a router serves. For one event loop.

    Args:
        place: who tells.
        board: who listens.
        traffic: what the router serves.
        increments: a listener of `traffic`.
        assigners: the clusters it holds.
        plane: where they lie.
    """

    def __init__(
        self,
        place: Place,
        board: Board,
        traffic: Traffic,
        increments: Increments,
        assigners: TenantAssigners,
        plane: ClusterMap,
    ) -> None:
        self._place, self._board = place, board
        self._traffic, self._increments = traffic, increments
        self._assigners, self._plane = assigners, plane
        self._points: dict[str, tuple[int, Points]] = {}

    async def report(self) -> None:
        """Tell once; the board then asks for the clusters that it does not know."""
        held = self._assigners
        versions = {name: held.of(name).snapshot.version for name in held.namespaces()}
        report = RouterReport(self._increments.take(self._traffic), versions)
        for name in await self._board.hear_router(self._place, report):
            if name in versions:
                await self._board.hear_table(await self._table(name))

    async def _table(self, namespace: str) -> ClusterTable:
        snapshot, clusters = await asyncio.to_thread(self._assigners.of(namespace).table)
        known = self._points.get(namespace)
        if known is None or known[0] != snapshot.version:
            points = await asyncio.to_thread(self._plane.place, snapshot.centroids)
            known = self._points[namespace] = snapshot.version, points
        self._points = {
            n: it for n, it in self._points.items() if n in self._assigners.namespaces()
        }
        return ClusterTable(namespace, snapshot.version, tuple(clusters), known[1])
