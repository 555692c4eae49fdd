"""From the engine's thread to the streams of an event loop, and from there on in chunks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from cluster_router.wire.types import TokenChunk

Outcome = TokenChunk | Exception
Delivery = tuple[asyncio.Queue[Outcome], Outcome]


def call_in(loop: asyncio.AbstractEventLoop, tell: Callable[..., None], *what: object) -> None:
    """Call `tell` in the thread of `loop`; one that is closed must not end this thread."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(tell, *what)


def put_all(deliveries: Iterable[Delivery]) -> None:
    """What came for several streams of one loop."""
    for outcomes, outcome in deliveries:
        outcomes.put_nowait(outcome)


async def next_chunk(outcomes: asyncio.Queue[Outcome], due: float | None) -> TokenChunk:
    """The next chunk of a stream, with what else comes for it until `due` on the loop's clock."""
    outcome = await outcomes.get()
    if isinstance(outcome, Exception):
        raise outcome
    found, clock = [outcome], asyncio.get_running_loop().time
    while due is not None and clock() < due and found[-1].finish_reason is None:
        try:
            async with asyncio.timeout_at(due):
                outcome = await outcomes.get()
        except TimeoutError:
            break
        if isinstance(outcome, Exception):
            outcomes.put_nowait(outcome)  # to be told after what came before it
            break
        found.append(outcome)
    return TokenChunk.joined(found)
