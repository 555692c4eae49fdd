"""Server-sent events: one for every chunk, in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster_router.openai.answers import Answer, Choice
from cluster_router.openai.common import StreamOptions
from cluster_router.openai.errors import error_answer
from cluster_router.openai.streams import Indexed
from cluster_router.wire.errors import EngineError

DONE = b"data: [DONE]\n\n"


async def first_of(chunks: AsyncGenerator[Indexed, None]) -> Indexed:
    """The first chunk, awaited before the answer's status is sent so that a refusal has its own.

    Raises:
        EngineError: the stream is empty.
    """
    async for item in chunks:
        return item
    raise EngineError("The service ended the answer before it began; send the request again.")


class EventStream(StreamingResponse):
    """Streams `answer`. Closing or cancelling it closes `chunks` and all that stands behind them.

    Args:
        answer: what is being answered.
        first: the first chunk, already taken from `chunks`.
        chunks: the rest.
        options: whether to end with the token counts, and to send them with every chunk.
        request_id: under which a failure is logged.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answer: Answer,
        first: Indexed,
        chunks: AsyncGenerator[Indexed, None],
        options: StreamOptions | None,
        request_id: str,
    ) -> None:
        self._chunks = chunks
        self._events = _events(answer, first, chunks, options, request_id)
        # Proxies that buffer would hold the tokens back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._events, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; where the caller leaves early, close what nothing else would."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()
            await self._chunks.aclose()


async def _events(
    answer: Answer,
    first: Indexed,
    chunks: AsyncGenerator[Indexed, None],
    options: StreamOptions | None,
    request_id: str,
) -> AsyncGenerator[bytes, None]:
    answer.choices[first[0]].see_update(first[1])
    frame = _Frame(answer, options)
    try:
        for choice in answer.choices:
            opening = choice.opening()
            if opening is not None:
                yield frame.event(choice.index, opening)
        yield frame.chunk(first)
        async for item in chunks:
            yield frame.chunk(item)
        for choice in answer.choices:
            choice.check_finished()
        if options is not None and options.include_usage:
            yield frame.usage()
        yield DONE
    except Exception as error:  # The status has been sent: all that is left is to say so in-band.
        yield b"data: " + _dumps(error_answer(error, request_id).body) + b"\n\n"


class _Frame:
    """Renders events. What does not change from token to token is rendered once."""

    def __init__(self, answer: Answer, options: StreamOptions | None) -> None:
        self._answer = answer
        counted = options is not None and bool(options.include_usage)
        self._every = counted and bool(options and options.continuous_usage_stats)
        self._end = b',"usage":null}\n\n' if counted else b"}\n\n"
        self._heads = [self._head(choice) for choice in answer.choices]

    def chunk(self, item: Indexed) -> bytes:
        """One event for one chunk."""
        index, chunk = item
        choice = self._answer.choices[index]
        choice.see(chunk)
        if chunk.stand_in is not None:
            self._heads[index] = self._head(choice)
        return self.event(index, choice.delta(chunk))

    def event(self, index: int, content: dict[str, Any]) -> bytes:
        """An event that holds one choice."""
        end = self._usage() if self._every else self._end
        return self._heads[index] + b',"choices":[' + _dumps(content) + b"]" + end

    def _head(self, choice: Choice) -> bytes:
        return b"data: " + _dumps(self._answer.head(choice, streamed=True))[:-1]

    def usage(self) -> bytes:
        """The event after the last choice."""
        return self._heads[0] + b',"choices":[]' + self._usage()

    def _usage(self) -> bytes:
        return b',"usage":' + _dumps(self._answer.usage()) + b"}\n\n"


def _dumps(value: object) -> bytes:
    # ASCII, because some clients split lines at Unicode's line separators too.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
