"""LearnerWorker: TenantLearners behind an event loop, learning and publishing in one thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from cluster_router.learning.tenants import TenantLearners
from cluster_router.wire.errors import ChameleonError
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import FloatArray

Batches = Sequence[tuple[str, FloatArray]]
"""Namespaces, each with embeddings [N, d] of its prompts, oldest first."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Published:
    """The clusters of a namespace, as routers see them.

    `at` is when this version was first published here, in Unix seconds.
    """

    version: int
    clusters: int
    at: float


@dataclass(frozen=True, slots=True)
class LearnerStatus:
    """What a learner has done since it started, and how it fares.

    Attributes:
        namespaces: those that learn.
        learned: prompts.
        refused: prompts that could not be learned from; the log says why.
        failures: why namespaces cannot be published at this moment, one sentence each.
        published: by namespace, of those that have learned since the start.
    """

    namespaces: int
    learned: int
    refused: int
    failures: tuple[str, ...]
    published: dict[str, Published]


class LearnerWorker:
    """Keeps the loop free: whatever takes time happens in a thread, in the order it was asked for.

    Args:
        learners: owned by this worker from now on.
    """

    def __init__(self, learners: TenantLearners) -> None:
        self._learners = learners
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")
        self._learned = self._refused = 0
        self._said: set[type] = set()  # kinds of refusal logged since the last publishing
        self._failures: dict[str, str] = {}
        self._published: dict[str, Published] = {}

    async def learn(self, batches: Batches) -> None:
        """Learn from `batches`. What cannot be learned from is counted and logged."""
        await self._run(self._learn, batches)

    async def publish(self) -> None:
        """Publish every namespace that has learned something.

        What cannot be saved is logged and kept; the next call tries again.
        """
        await self._run(self._publish)

    async def publish_every(self, interval_s: float) -> NoReturn:
        """Publish each `interval_s`, for ever."""
        while True:
            await asyncio.sleep(interval_s)
            await self.publish()

    def status(self) -> LearnerStatus:
        """Counts at this moment."""
        return LearnerStatus(
            namespaces=len(self._learners.namespaces()),
            learned=self._learned,
            refused=self._refused,
            failures=tuple(self._failures.values()),
            published=dict(self._published),
        )

    def close(self) -> None:
        """Let what runs end, and stop the thread."""
        self._thread.shutdown(cancel_futures=True)

    async def _run(self, *call: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, *call)  # type: ignore[arg-type]

    # The rest runs in the thread.

    def _learn(self, batches: Batches) -> None:
        for namespace, embeddings in batches:
            try:
                self._learners.learn(namespace, embeddings)
            except ChameleonError as error:
                self._refused += len(embeddings)
                if type(error) not in self._said:
                    logger.error("prompts are not learned from: %s", error)
                self._said.add(type(error))
            else:
                self._learned += len(embeddings)

    def _publish(self) -> None:
        self._said.clear()
        for namespace in self._learners.namespaces():
            try:
                snapshot = self._learners.publish(namespace)
            except Exception as error:  # whatever the client of an object store raises
                why = str(error) or repr(error)
                if namespace not in self._failures:
                    logger.error("clusters are learned but not published: %s", why)
                self._failures[namespace] = why
            else:
                self._note(namespace, snapshot)
                if self._failures.pop(namespace, None):
                    logger.warning("clusters are published again")

    def _note(self, namespace: str, snapshot: ClusterSnapshot) -> None:
        last = self._published.get(namespace)
        if last is None or last.version != snapshot.version:
            self._published[namespace] = Published(snapshot.version, len(snapshot), time.time())


def by_namespace(embeddings: Iterable[tuple[str, FloatArray]]) -> Batches:
    """Embeddings [d] of single prompts, each with its namespace, as batches."""
    rows: dict[str, list[FloatArray]] = {}
    for namespace, embedding in embeddings:
        rows.setdefault(namespace, []).append(embedding)
    return [(namespace, np.stack(found)) for namespace, found in rows.items()]
