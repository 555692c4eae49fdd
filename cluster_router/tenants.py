"""TenantAssigners: one Assigner for each namespace, which follows what is published for it."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

from cluster_router.clusters import Assigner
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import DEFAULT_NAMESPACE

NewerSnapshot = Callable[[str, int], ClusterSnapshot | None]
"""Reads the last snapshot of a namespace, if there is one newer than a version. May block, and
raise SetupError."""

logger = logging.getLogger(__name__)

_READERS = 2


@dataclass(frozen=True, slots=True)
class _Reading:
    """A namespace's first, and how long others wait for it, on the event loop's clock."""

    task: asyncio.Task[None]
    until: float


class TenantAssigners:
    """Assigners by namespace. A namespace never sees another's clusters.

    Each begins with the clusters that `make` gives it. Lives on one event loop: only there are
    snapshots swapped, so that whatever does not await sees one moment.

    Args:
        make: an Assigner for a namespace, over the clusters that each begins with.
        newer: where published snapshots come from; None where nothing is learned.
        max_namespaces: how many are kept beside the default one. The least recently used goes;
            when asked for again, it is read again.
        patience_s: longest that those who ask for a namespace wait for its first reading.
    """

    def __init__(
        self,
        make: Callable[[str], Assigner],
        newer: NewerSnapshot | None = None,
        max_namespaces: int = 64,
        patience_s: float = 2.0,
    ) -> None:
        self._make = make
        self._newer = newer
        self._max, self._patience_s = max_namespaces, patience_s
        self._assigners = OrderedDict({DEFAULT_NAMESPACE: make(DEFAULT_NAMESPACE)})
        self._failing: set[str] = set()
        self._readings: dict[str, _Reading] = {}
        # Threads of its own: where the store hangs, others that need one do not.
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="snapshot-reader")

    def of(self, namespace: str) -> Assigner:
        """The Assigner of `namespace`, as it is. One heard of first now begins to be read."""
        if namespace not in self._assigners:
            self._assigners[namespace] = self._make(namespace)
            if self._newer is not None and namespace not in self._readings:
                self._begin_to_read(namespace)
            if len(self._assigners) > self._max + 1:
                self._forget(next(name for name in self._assigners if name != DEFAULT_NAMESPACE))
        self._assigners.move_to_end(namespace)
        return self._assigners[namespace]

    async def ready(self, namespace: str) -> Assigner:
        """The Assigner of `namespace`, once it has been read or that takes too long."""
        assigner = self.of(namespace)
        reading = self._readings.get(namespace)
        if reading is None:
            return assigner
        left = reading.until - asyncio.get_running_loop().time()
        await asyncio.wait((reading.task,), timeout=max(0.0, left))
        return self.of(namespace)

    def namespaces(self) -> list[str]:
        """Namespaces held, the least recently used first."""
        return list(self._assigners)

    def load(self, namespace: str = DEFAULT_NAMESPACE) -> None:
        """Read the last snapshot of `namespace` here and now; blocks, so for start-up."""
        self._use(namespace, self._read(namespace, self.of(namespace).snapshot.version))

    async def refresh(self, namespaces: Iterable[str]) -> None:
        """Take up what has been published for `namespaces`. What cannot be read is logged."""
        loop = asyncio.get_running_loop()
        for name in namespaces:
            held = self._assigners.get(name)
            if held is not None:
                version = held.snapshot.version
                read = loop.run_in_executor(self._readers, self._read, name, version)
                self._use(name, await read)

    async def follow(self, interval_s: float) -> NoReturn:
        """Refresh every namespace each `interval_s`."""
        while True:
            await self.refresh(self.namespaces())
            await asyncio.sleep(interval_s)

    def _begin_to_read(self, namespace: str) -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(self.refresh([namespace]))
        self._readings[namespace] = _Reading(task, loop.time() + self._patience_s)
        task.add_done_callback(lambda _: self._readings.pop(namespace))

    def _read(self, namespace: str, version: int) -> ClusterSnapshot | None:
        if self._newer is None:
            return None
        try:
            snapshot = self._newer(namespace, version)
        except Exception as error:  # whatever the store's client raises, requests go on
            if namespace not in self._failing:
                logger.error("%s; requests go on with snapshot %d", error, version)
            self._failing.add(namespace)
            return None
        self._failing.discard(namespace)
        return snapshot

    def _use(self, namespace: str, snapshot: ClusterSnapshot | None) -> None:
        held = self._assigners.get(namespace)
        if held is not None and snapshot is not None and snapshot.version > held.snapshot.version:
            held.swap(snapshot)

    def _forget(self, namespace: str) -> None:
        del self._assigners[namespace]
        self._failing.discard(namespace)
