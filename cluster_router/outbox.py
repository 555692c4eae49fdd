"""Outbox: what requests leave behind, on its way to whoever learns from it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic, NoReturn, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Outbox(Generic[T]):
    """Sends items in batches, and forgets them: no request waits for it or fails by it.

    Lives on one event loop.

    Attributes:
        sent: items that arrived.
        lost: items that were sent in vain, the receiver being down.
        dropped: items that had to make room for newer ones.

    Args:
        send: delivers a batch, oldest first.
        receiver: who that is, for the log.
        size: items that are sent without further delay.
        interval_s: longest that an item waits for others.
        capacity: most items that wait; beyond it the oldest are dropped.
        patience_s: how long `send` may take.
    """

    def __init__(
        self,
        send: Callable[[list[T]], Awaitable[object]],
        receiver: str = "learner",
        size: int = 64,
        interval_s: float = 0.2,
        capacity: int = 4096,
        patience_s: float = 30.0,
    ) -> None:
        self._send = send
        self._receiver = receiver
        self._size = size
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._waiting: deque[T] = deque(maxlen=capacity)
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._failing = False
        self.sent = self.lost = self.dropped = 0

    def add(self, item: T) -> None:
        """Take what one prompt leaves behind."""
        if len(self._waiting) == self._waiting.maxlen:
            self.dropped += 1
        self._waiting.append(item)
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
                await self._send(taken)
        except Exception as error:  # whatever befalls the receiver, requests go on
            self.lost += len(taken)
            if not self._failing:
                logger.warning(
                    "no %s is reached (%r); requests go on with what it has learned",
                    self._receiver,
                    error,
                )
            self._failing = True
        else:
            self.sent += len(taken)
            self._failing = False
