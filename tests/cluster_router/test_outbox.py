"""Embeddings reach the learner in batches, or are given up; nobody waits for them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest

from cluster_router.learning.worker import Batches, by_namespace
from cluster_router.outbox import Outbox
from cluster_router.wire.types import FloatArray

Item = tuple[str, FloatArray]


class Learner:
    """Keeps what it is sent; fails or hangs where told to."""

    def __init__(self) -> None:
        self.calls: list[Batches] = []
        self.failure: Exception | None = None
        self.stall: asyncio.Event | None = None

    async def learn(self, items: list[Item]) -> None:
        if self.stall is not None:
            await self.stall.wait()
        if self.failure is not None:
            raise self.failure
        self.calls.append(by_namespace(items))

    def numbers(self, namespace: str) -> list[int]:
        """First coordinates of all embeddings of a namespace, in the order they came."""
        rows = [rows[:, 0] for call in self.calls for name, rows in call if name == namespace]
        return np.concatenate(rows).astype(int).tolist() if rows else []


def embedding(number: int) -> np.ndarray:
    return np.array([number, 1], np.float32)


@pytest.fixture
def learner() -> Learner:
    return Learner()


@asynccontextmanager
async def running(outbox: Outbox[Item]) -> AsyncIterator[None]:
    task = asyncio.create_task(outbox.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not check():
            await asyncio.sleep(0.005)


async def test_each_namespace_in_order_within_the_interval(learner: Learner) -> None:
    outbox = Outbox(learner.learn, size=100, interval_s=0.02)
    async with running(outbox):
        for number in range(6):
            outbox.add(("ab"[number % 2], embedding(number)))
        await until(lambda: outbox.sent == 6)
    assert len(learner.calls) == 1
    assert learner.numbers("a") == [0, 2, 4]
    assert learner.numbers("b") == [1, 3, 5]
    assert all(rows.dtype == np.float32 for call in learner.calls for _, rows in call)


async def test_a_full_batch_does_not_wait(learner: Learner) -> None:
    outbox = Outbox(learner.learn, size=4, interval_s=60)
    async with running(outbox):
        for number in range(4):
            outbox.add(("", embedding(number)))
        await until(lambda: outbox.sent == 4)
        outbox.add(("", embedding(4)))
        await asyncio.sleep(0.05)
        assert outbox.sent == 4


async def test_while_the_learner_hangs_the_oldest_make_room(learner: Learner) -> None:
    outbox = Outbox(learner.learn, size=1, interval_s=0.01, capacity=5)
    learner.stall = asyncio.Event()
    async with running(outbox):
        outbox.add(("", embedding(0)))
        await asyncio.sleep(0.05)  # on its way
        for number in range(1, 9):
            outbox.add(("", embedding(number)))
        assert outbox.dropped == 3
        learner.stall.set()
        await until(lambda: outbox.sent == 6)
    assert learner.numbers("") == [0, 4, 5, 6, 7, 8]


async def test_a_learner_that_fails_is_told_the_next_ones(
    learner: Learner, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Outbox(learner.learn, size=1, interval_s=0.01)
    learner.failure = RuntimeError("dead")
    async with running(outbox):
        with caplog.at_level(logging.WARNING):
            for number in range(3):
                outbox.add(("", embedding(number)))
                await until(lambda number=number: outbox.lost == number + 1)
        assert [record.message.count("dead") for record in caplog.records] == [1]
        learner.failure = None
        outbox.add(("", embedding(3)))
        await until(lambda: outbox.sent == 1)
    assert learner.numbers("") == [3]


async def test_a_learner_that_hangs_is_given_up(learner: Learner) -> None:
    outbox = Outbox(learner.learn, size=1, interval_s=0.01, patience_s=0.05)
    learner.stall = asyncio.Event()
    async with running(outbox):
        outbox.add(("", embedding(0)))
        await until(lambda: outbox.lost == 1)
        learner.stall = None
        outbox.add(("", embedding(1)))
        await until(lambda: outbox.sent == 1)
    assert learner.numbers("") == [1]
