"""Answers in the making: the choices of one request, streamed or whole."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from cluster_router.wire.errors import EngineError, UnavailableError
from cluster_router.wire.types import (
    Adaptation,
    AdapterKey,
    Assignment,
    TokenChunk,
    TokenizedRequest,
)


class Layout(Protocol):
    """How an endpoint lays out one choice. Keeps the state that the choice's chunks share."""

    def opening(self) -> dict[str, Any] | None:
        """What a streamed choice begins with, if anything."""

    def delta(self, chunk: TokenChunk) -> dict[str, Any]:
        """What `chunk` adds to a streamed choice."""

    def whole(self, answer: TokenChunk) -> dict[str, Any]:
        """The choice when all its chunks are joined in `answer`."""


def describe(assignment: Assignment, stand_in: AdapterKey | None = None) -> dict[str, Any]:
    """The `adaptation` object that callers see."""
    return asdict(Adaptation.of(assignment, stand_in))


@dataclass
class Choice:
    """One answer of a request.

    Attributes:
        tells_adaptation: whether the choice carries its own `adaptation`, because the request has
            several prompts.
        is_sample: whether an earlier choice answers the same prompt.
        cached_tokens: prompt tokens that the worker did not have to compute.
        completion_tokens: tokens seen so far.
        finished: a finish reason has been seen.
    """

    index: int
    request: TokenizedRequest
    layout: Layout
    tells_adaptation: bool = False
    is_sample: bool = False
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: bool = False
    adaptation: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.adaptation = describe(self.request.assignment)

    def see_update(self, chunk: TokenChunk) -> None:
        """Take from the choice's first chunk under which update it runs."""
        if chunk.stand_in is not None:
            self.adaptation = describe(self.request.assignment, chunk.stand_in)

    def see(self, chunk: TokenChunk) -> None:
        """Count `chunk`.

        Raises:
            UnavailableError: the worker gave the answer up.
        """
        if chunk.finish_reason == "abort":
            raise UnavailableError("The server stopped this answer before its end; send it again.")
        self.see_update(chunk)
        self.completion_tokens += len(chunk.tokens)
        self.cached_tokens += chunk.cached_tokens
        self.finished = chunk.finish_reason is not None

    def check_finished(self) -> None:
        """Raise EngineError unless the answer is complete."""
        if not self.finished:
            raise EngineError("The answer was cut off inside the service; send the request again.")

    def opening(self) -> dict[str, Any] | None:
        """The choice's first event, if its endpoint has one."""
        start = self.layout.opening()
        return None if start is None else self._framed(start, TokenChunk(""))

    def delta(self, chunk: TokenChunk) -> dict[str, Any]:
        """The choice's part of one event."""
        return self._framed(self.layout.delta(chunk), chunk)

    def whole(self, chunks: Sequence[TokenChunk]) -> dict[str, Any]:
        """The finished choice."""
        answer = TokenChunk.joined(chunks)
        return self._framed(self.layout.whole(answer), answer)

    def _framed(self, content: dict[str, Any], chunk: TokenChunk) -> dict[str, Any]:
        framed = {
            "index": self.index,
            **content,
            "finish_reason": chunk.finish_reason,
            "stop_reason": chunk.stop_reason,
        }
        if self.tells_adaptation:
            framed["adaptation"] = self.adaptation
        return framed


@dataclass(frozen=True)
class Answer:
    """All choices of one request, and what is said of them together.

    Attributes:
        id: names the answer to the caller.
        kinds: the `object` field of a whole answer and of a streamed chunk.
        prompt_tokens: tokens of all prompts, each counted once whatever `n` is.
    """

    id: str
    model: str
    kinds: tuple[str, str]
    choices: Sequence[Choice]
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, choice: Choice, streamed: bool) -> dict[str, Any]:
        """The fields around `choice`."""
        return {
            "id": self.id,
            "object": self.kinds[streamed],
            "created": self.created,
            "model": self.model,
            "adaptation": choice.adaptation,
        }

    def usage(self) -> dict[str, Any]:
        """Token counts up to now."""
        completion = sum(choice.completion_tokens for choice in self.choices)
        cached = sum(choice.cached_tokens for choice in self.choices if not choice.is_sample)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def whole(self, chunks: Iterable[tuple[int, TokenChunk]]) -> dict[str, Any]:
        """The body of an answer that is not streamed; `chunks` carry their choice's index.

        Raises:
            UnavailableError, EngineError: a choice was given up or cut off.
        """
        parts: list[list[TokenChunk]] = [[] for _ in self.choices]
        for index, chunk in chunks:
            self.choices[index].see(chunk)
            parts[index].append(chunk)
        for choice in self.choices:
            choice.check_finished()
        return {
            **self.head(self.choices[0], streamed=False),
            "choices": [
                choice.whole(part) for choice, part in zip(self.choices, parts, strict=True)
            ],
            "usage": self.usage(),
        }
