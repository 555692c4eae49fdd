"""StatusBoard: what all replicas said of themselves last, and what their traffic was."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cluster_router.console.history import History
from cluster_router.console.reports import (
    ClusterTable,
    EngineReport,
    GeneratorReport,
    LearnerReport,
    Place,
    RouterReport,
)

EXPIRY_S = 10.0
"""A replica not heard of for so long is gone."""

_REFRESH_S = 15.0
_MOST_NAMESPACES = 65
_MOST_SIZES = 120
_SIZE_STEP_S = 30.0

R = TypeVar("R", EngineReport, GeneratorReport, LearnerReport, RouterReport)


@dataclass(slots=True)
class Heard(Generic[R]):
    """The last report of a replica.

    Attributes:
        since, at: when the first and the last report came, in the board's seconds.
    """

    place: Place
    since: float
    at: float
    report: R


@dataclass(slots=True)
class Known:
    """A cluster over time.

    Attributes:
        since: Unix time when it appeared; None if the board found it there.
        sizes: Unix times, and the prompts it stood for then; of the last hour.
    """

    since: float | None
    sizes: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_MOST_SIZES))


class StatusBoard:
    """Hears replicas, and forgets those that fall silent. All in memory, and bounded.

    Args:
        clock: seconds, monotonic.
        wall: Unix time.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.clock, self.wall = clock, wall
        self.history = History()
        self.started = wall()
        self._engines: dict[str, Heard[EngineReport]] = {}
        self._generators: dict[str, Heard[GeneratorReport]] = {}
        self._learners: dict[str, Heard[LearnerReport]] = {}
        self._routers: dict[str, Heard[RouterReport]] = {}
        self._tables: OrderedDict[str, tuple[float, ClusterTable]] = OrderedDict()
        self._known: dict[str, dict[int, Known]] = {}

    def hear_engine(self, place: Place, report: EngineReport) -> None:
        """Take the report of an LM replica."""
        _hear(self._engines, place, report, self.clock())

    def hear_generator(self, place: Place, report: GeneratorReport) -> None:
        """Take the report of an adapter generator."""
        _hear(self._generators, place, report, self.clock())

    def hear_learner(self, place: Place, report: LearnerReport) -> None:
        """Take the report of the learner."""
        _hear(self._learners, place, report, self.clock())

    def hear_router(self, place: Place, report: RouterReport) -> list[str]:
        """Take a router's report; returns the namespaces whose tables the board wants of it."""
        now = self.clock()
        _hear(self._routers, place, report, now)
        for key, numbers in report.served.counts:
            self.history.add(now, key, numbers)
        return [name for name, version in report.versions.items() if self._wants(name, version)]

    def hear_table(self, table: ClusterTable) -> None:
        """Take the clusters of a namespace, unless newer ones are known."""
        held = self._tables.get(table.namespace)
        if held is not None and held[1].version > table.version:
            return
        self._tables[table.namespace] = self.clock(), table
        self._tables.move_to_end(table.namespace)
        self._remember(table, first=held is None)
        while len(self._tables) > _MOST_NAMESPACES:
            gone, _ = self._tables.popitem(last=False)
            self._known.pop(gone, None)

    @property
    def engines(self) -> list[Heard[EngineReport]]:
        """LM replicas that live, by name."""
        return _living(self._engines, self.clock())

    @property
    def generators(self) -> list[Heard[GeneratorReport]]:
        """Adapter generators that live, by name."""
        return _living(self._generators, self.clock())

    @property
    def learners(self) -> list[Heard[LearnerReport]]:
        """The learner, if it lives; the one before it too, until that is forgotten."""
        return _living(self._learners, self.clock())

    @property
    def routers(self) -> list[Heard[RouterReport]]:
        """Routers that live, by name."""
        return _living(self._routers, self.clock())

    @property
    def tables(self) -> dict[str, ClusterTable]:
        """Clusters by namespace."""
        return {name: table for name, (_, table) in self._tables.items()}

    def known(self, namespace: str, cluster: int) -> Known:
        """What is remembered of a cluster; of one that is gone, nothing."""
        return self._known.get(namespace, {}).get(cluster) or Known(None)

    def _wants(self, namespace: str, version: int) -> bool:
        if namespace not in self._tables:
            return True
        at, table = self._tables[namespace]
        # Refinements come without a new snapshot, so that equal ones are asked for at times too.
        stale = self.clock() - at > _REFRESH_S
        return version > table.version or (stale and version == table.version)

    def _remember(self, table: ClusterTable, first: bool) -> None:
        now = self.wall()
        before = self._known.get(table.namespace, {})
        after: dict[int, Known] = {}
        for one in table.clusters:
            known = before.get(one.id) or Known(None if first else now)
            after[one.id] = known
            if known.sizes and now - known.sizes[-1][0] < _SIZE_STEP_S:
                known.sizes[-1] = (known.sizes[-1][0], one.size)
            else:
                known.sizes.append((now, one.size))
        self._known[table.namespace] = after


def _hear(held: dict[str, Heard[R]], place: Place, report: R, now: float) -> None:
    before = held.get(place.replica)
    held[place.replica] = Heard(place, now if before is None else before.since, now, report)


def _living(held: dict[str, Heard[R]], now: float) -> list[Heard[R]]:
    """Those that live, by name; the others are dropped."""
    for name in [name for name, one in held.items() if now - one.at > EXPIRY_S]:
        del held[name]
    return [held[name] for name in sorted(held)]
