"""The console's board: its deployment, and how replicas tell it of themselves.

All of them report to the one board each second and never wait for it in a request's way, so that
whichever router serves the page shows every replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster_router.console.board import StatusBoard
from cluster_router.console.reporter import PERIOD_S
from cluster_router.console.reports import (
    ClusterTable,
    EngineReport,
    GeneratorReport,
    LearnerReport,
    Place,
    RouterReport,
)
from cluster_router.console.view import Viewer, state_of
from cluster_router.wire.errors import UnavailableError
from deploy.reporting import report_every

_PATIENCE_S = 5.0


class BoardReplica:
    """Serves a StatusBoard."""

    def __init__(self) -> None:
        self._board = StatusBoard()

    async def hear_engine(self, place: Place, report: EngineReport) -> None:
        """See StatusBoard.hear_engine."""
        self._board.hear_engine(place, report)

    async def hear_generator(self, place: Place, report: GeneratorReport) -> None:
        """See StatusBoard.hear_generator."""
        self._board.hear_generator(place, report)

    async def hear_learner(self, place: Place, report: LearnerReport) -> None:
        """See StatusBoard.hear_learner."""
        self._board.hear_learner(place, report)

    async def hear_router(self, place: Place, report: RouterReport) -> list[str]:
        """See StatusBoard.hear_router."""
        return self._board.hear_router(place, report)

    async def hear_table(self, table: ClusterTable) -> None:
        """See StatusBoard.hear_table."""
        self._board.hear_table(table)

    async def state(self, viewer: Viewer) -> dict[str, Any]:
        """See state_of."""
        return state_of(self._board, viewer)


class RemoteBoard:
    """The board, seen through its handle."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def hear_engine(self, place: Place, report: EngineReport) -> None:
        """See StatusBoard.hear_engine."""
        await self._handle.hear_engine.remote(place, report)

    async def hear_generator(self, place: Place, report: GeneratorReport) -> None:
        """See StatusBoard.hear_generator."""
        await self._handle.hear_generator.remote(place, report)

    async def hear_learner(self, place: Place, report: LearnerReport) -> None:
        """See StatusBoard.hear_learner."""
        await self._handle.hear_learner.remote(place, report)

    async def hear_router(self, place: Place, report: RouterReport) -> list[str]:
        """See StatusBoard.hear_router."""
        return await self._handle.hear_router.remote(place, report)

    async def hear_table(self, table: ClusterTable) -> None:
        """See StatusBoard.hear_table."""
        await self._handle.hear_table.remote(table)

    async def state(self, viewer: Viewer) -> dict[str, Any]:
        """See state_of.

        Raises:
            UnavailableError: the board does not answer.
        """
        response = self._handle.state.remote(viewer)
        try:
            return await asyncio.wait_for(response, _PATIENCE_S)
        except Exception as error:
            raise UnavailableError(
                "The console's board does not answer; requests go on."
            ) from error


def here() -> Place:
    """The replica that this is called in."""
    context = serve.get_replica_context()
    return Place(context.replica_id.unique_id, ray.util.get_node_ip_address())


def telling(
    board: DeploymentHandle | None, tell: Callable[[RemoteBoard, Place], Awaitable[None]]
) -> list[asyncio.Task[NoReturn]]:
    """Have this replica `tell` the board each second; a task to be kept, none without a board."""
    if board is None:
        return []
    remote, place = RemoteBoard(board), here()

    async def report() -> None:
        await tell(remote, place)

    return [asyncio.get_running_loop().create_task(report_every(PERIOD_S, report))]
