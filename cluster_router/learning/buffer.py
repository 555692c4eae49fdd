"""EmbeddingBuffer: what prompts leave behind, on its way to the learner."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import NoReturn

import numpy as np

from cluster_router.wire.types import FloatArray

Batches = Sequence[tuple[str, FloatArray]]
"""Namespaces, each with embeddings [N, d] of its prompts, oldest first."""

logger = logging.getLogger(__name__)


class EmbeddingBuffer:
    """Sends embeddings in batches, and forgets them: no request waits for it or fails by it.

    Lives on one event loop.

    Attributes:
        sent: embeddings that arrived.
        lost: embeddings that were sent in vain, the learner being down.
        dropped: embeddings that had to make room for newer ones.

    Args:
        send: delivers batches.
        size: embeddings that are sent without further delay.
        interval_s: longest that an embedding waits for others.
        capacity: most embeddings that wait; beyond it the oldest are dropped.
        patience_s: how long `send` may take.
    """

    def __init__(
        self,
        send: Callable[[Batches], Awaitable[object]],
        size: int = 64,
        interval_s: float = 0.2,
        capacity: int = 4096,
        patience_s: float = 30.0,
    ) -> None:
        self._send = send
        self._size = size
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._waiting: deque[tuple[str, FloatArray]] = deque(maxlen=capacity)
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._failing = False
        self.sent = self.lost = self.dropped = 0

    def add(self, namespace: str, embedding: FloatArray) -> None:
        """Take the embedding [d] of one prompt."""
        if len(self._waiting) == self._waiting.maxlen:
            self.dropped += 1
        self._waiting.append((namespace, embedding))
        self._some.set()
        if len(self._waiting) >= self._size:
            self._enough.set()

    async def run(self) -> NoReturn:
        """Send what comes, for ever."""
        while True:
            await self._some.wait()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._interval_s):
                    await self._enough.wait()
            await self._deliver()

    async def _deliver(self) -> None:
        taken = list(self._waiting)
        self._waiting.clear()
        self._some.clear()
        self._enough.clear()
        try:
            async with asyncio.timeout(self._patience_s):
                await self._send(_grouped(taken))
        except Exception as error:  # whatever befalls the learner, requests go on
            self.lost += len(taken)
            if not self._failing:
                logger.warning("no learner is reached (%r); clusters stay as they are", error)
            self._failing = True
        else:
            self.sent += len(taken)
            self._failing = False


def _grouped(taken: Iterable[tuple[str, FloatArray]]) -> list[tuple[str, FloatArray]]:
    rows: dict[str, list[FloatArray]] = {}
    for namespace, embedding in taken:
        rows.setdefault(namespace, []).append(embedding)
    return [(namespace, np.stack(embeddings)) for namespace, embeddings in rows.items()]
