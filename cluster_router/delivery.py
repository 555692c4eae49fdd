"""Delivery: an answer that has not begun is sent for again; each ends at its deadline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace

from cluster_router.router import Worker
from cluster_router.wire.errors import DeadlineError, UnavailableError
from cluster_router.wire.types import TokenChunk, TokenizedRequest

logger = logging.getLogger(__name__)


class Delivery:
    """Satisfies Worker. Lives on one event loop, over a worker that stands for many replicas.

    A replica may be lost at any moment. While nobody has seen anything of an answer, it is sent for
    again; once a chunk has gone out, another replica would begin another answer, so the loss is
    told. An answer that is wanted whole goes out when it is complete; its chunks then say when each
    of them came.

    Args:
        worker: raises UnavailableError where a replica is lost; chooses another when asked again.
        attempts: how often one answer is sent for. A request that kills replicas must not kill all.
        pause_s: before the second attempt; doubled before each later one.
        timeout_s: seconds that an answer may take, and the most that a request may ask for; None
            is no limit.
        clock: seconds, monotonic; that of Traffic, which reads what the chunks say.
    """

    def __init__(
        self,
        worker: Worker,
        attempts: int = 3,
        pause_s: float = 0.1,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._attempts, self._pause_s = attempts, pause_s
        self._timeout_s = timeout_s
        self._clock = clock

    async def generate(self, request: TokenizedRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream the answer to `request`.

        Raises:
            DeadlineError: it was not complete in time.
            UnavailableError: its replica was lost after a chunk had gone out, or each one asked was
                lost before.
        """
        allowed = [one for one in (request.timeout_s, self._timeout_s) if one is not None]
        timeout_s = min(allowed, default=None)
        clock = asyncio.get_running_loop().time
        deadline = None if timeout_s is None else clock() + timeout_s
        begun = False
        try:
            for attempt in range(self._attempts):
                held: list[TokenChunk] = []
                try:
                    async with aclosing(_until(deadline, self._sent(request, attempt))) as chunks:
                        async for chunk in chunks:
                            if request.whole:
                                held.append(replace(chunk, received_s=self._clock()))
                                continue
                            begun = True
                            yield chunk
                    for chunk in held:
                        yield chunk
                    return
                except UnavailableError as error:
                    if begun or attempt == self._attempts - 1:
                        raise
                    logger.warning("%s is sent again: %s", request.request_id, error)
                await asyncio.sleep(self._pause_s * 2**attempt)
        except _ExpiredError:
            progress = "had begun, but was not complete," if begun else "had not begun"
            raise DeadlineError(
                f"The answer {progress} within its {timeout_s:g} s; ask for fewer tokens, or allow "
                "it more time (timeout_s).",
                "timeout_s",
            ) from None

    def _sent(self, request: TokenizedRequest, attempt: int) -> AsyncIterator[TokenChunk]:
        if attempt:
            # A replica that was only out of reach may still hold the request by its old name.
            request = replace(request, request_id=f"{request.request_id}.{attempt}")
        return self._worker.generate(request)


class _ExpiredError(Exception):
    """The deadline has passed. Not TimeoutError, which a worker may have its own of."""


async def _until(
    deadline: float | None, chunks: AsyncIterator[TokenChunk]
) -> AsyncGenerator[TokenChunk, None]:
    """`chunks`, closed however this ends.

    Raises:
        _ExpiredError: the next one did not come before `deadline`, on the event loop's clock.
    """
    clock = asyncio.get_running_loop().time
    try:
        while True:
            if deadline is not None and clock() >= deadline:  # though the next one may be here
                raise _ExpiredError
            limit = asyncio.timeout_at(deadline)
            try:
                async with limit:
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if limit.expired():
                    raise _ExpiredError from None
                raise
            yield chunk
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
