"""GainProbe: what the clusters' updates are worth on live traffic, estimated on a few requests.

After an answer has ended, its prompt is scored twice: under its cluster's own update and under the
static one that all clusters share. The prompt and not the answer, which was drawn from one of them;
so a prompt that holds an earlier answer is not scored either.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import NoReturn
from uuid import uuid4

from cluster_router.router import Worker
from cluster_router.tally import StreamEnd
from cluster_router.wire.errors import ChameleonError
from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest

_SCORE = SamplingParams(max_tokens=0, prompt_logprobs=0)
_MOST_WAITING = 4
_MIN_PROMPT, _MAX_PROMPT = 32, 256
_MIN_OUTPUT = 8

logger = logging.getLogger(__name__)


class GainProbe:
    """Takes a share of the requests, one at a time, at low priority. For one event loop.

    Nothing is kept of a prompt once it is scored, and no more than a few wait for that. Requests
    that may not be learned from are left alone, and so are those that did not choose their cluster
    themselves, ran under a stand-in, are short, or hold an earlier answer.

    Args:
        worker: scores. It refuses background requests while it has no room for them.
        gained: told the namespace, the cluster, and the gain in nats per token.
        share: of the requests that fit; 0 takes none.
        draw: random numbers in [0, 1).
    """

    def __init__(
        self,
        worker: Worker,
        gained: Callable[[str, int, float], None],
        share: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._worker, self._gained = worker, gained
        self._share, self._draw = share, draw
        self._waiting: asyncio.Queue[TokenizedRequest] = asyncio.Queue(_MOST_WAITING)

    def ended(self, request: TokenizedRequest, end: StreamEnd) -> None:
        """Take a request whose stream has ended, or leave it. A listener of Traffic."""
        taken = request.learn and self._fits(request, end) and self._draw() < self._share
        if taken and not self._waiting.full():
            self._waiting.put_nowait(request)

    async def run(self) -> NoReturn:
        """Score what was taken, for ever."""
        while True:
            request = await self._waiting.get()
            try:
                gain = await self.gain(request)
            except Exception as error:  # no room, or a lost replica: the estimate is left out
                logger.debug("no estimate of the gain: %r", error)
            else:
                cluster = request.assignment.cluster
                if gain is not None and cluster is not None:
                    self._gained(request.namespace, cluster, gain)

    async def gain(self, request: TokenizedRequest) -> float | None:
        """Nats per token of the prompt; None if its update could not be had.

        Raises:
            ChameleonError: it cannot be scored now.
        """
        own = request.assignment
        if own.key is None:
            return None
        key = replace(own.key, cluster=None, version=0, refinement="")
        static = Assignment(key, snapshot_version=own.snapshot_version)
        under_own = await self._loss(request, own)
        under_static = await self._loss(request, static)
        if under_own is None or under_static is None:
            return None
        return under_static - under_own

    async def _loss(self, request: TokenizedRequest, assignment: Assignment) -> float | None:
        scoring = TokenizedRequest(
            f"gain-{uuid4().hex}",
            request.prompt_tokens[:_MAX_PROMPT],
            _SCORE,
            assignment,
            namespace=request.namespace,
            learn=False,
            background=True,
        )
        chunks = self._worker.generate(scoring)
        try:
            async for chunk in chunks:
                if chunk.stand_in is not None:
                    return None
                scored = [one.logprob for one in chunk.prompt_logprobs or ()]
                values = [value for value in scored if value is not None]
                if values:
                    return -sum(values) / len(values)
        finally:
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()
        raise ChameleonError("the prompt was not scored")

    @staticmethod
    def _fits(request: TokenizedRequest, end: StreamEnd) -> bool:
        chosen = end.adaptation
        return (
            chosen.mode == "cluster"
            and not request.answered
            and not chosen.fallback
            and chosen.similarity is not None
            and end.error is None
            and end.output_tokens >= _MIN_OUTPUT
            and len(request.prompt_tokens) >= _MIN_PROMPT
        )
