"""Reading the streams behind an answer: many at once, until they end or the caller leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from cluster_router.wire.types import TokenChunk

T = TypeVar("T")
Indexed = tuple[int, TokenChunk]


async def merge(streams: Sequence[AsyncIterator[TokenChunk]]) -> AsyncGenerator[Indexed, None]:
    """Chunks of all streams as they come, each with the index of its stream.

    The first failure ends them all. However this ends, every stream is closed.
    """
    if len(streams) > 1:
        async for item in _merge_many(streams):
            yield item
        return
    try:
        async for chunk in streams[0]:
            yield 0, chunk
    finally:
        await _close(streams[0])


async def _merge_many(
    streams: Sequence[AsyncIterator[TokenChunk]],
) -> AsyncGenerator[Indexed, None]:
    # Not bounded: a stream holds at most one context of tokens, and a slow caller of one choice
    # must not hold up the engine's other choices.
    queue: asyncio.Queue[Indexed | asyncio.Task[None]] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_pump(index, stream, queue)) for index, stream in enumerate(streams)
    ]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    index: int,
    stream: AsyncIterator[TokenChunk],
    queue: asyncio.Queue[Indexed | asyncio.Task[None]],
) -> None:
    try:
        async for chunk in stream:
            queue.put_nowait((index, chunk))
    finally:
        await _close(stream)


async def _close(stream: AsyncIterator[TokenChunk]) -> None:
    if isinstance(stream, AsyncGenerator):
        await stream.aclose()


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it when the caller goes away.

    Raises:
        ClientDisconnect: the caller went away first.
    """
    job = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((job, leaving), return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        raise ClientDisconnect
    finally:
        job.cancel()
        leaving.cancel()
        await asyncio.gather(job, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    """Return when the caller has gone; the body has been read, so nothing else can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
