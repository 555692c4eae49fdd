"""LMWorker: the engine behind asynchronous streams."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from queue import Empty, SimpleQueue
from typing import Protocol

from cachetools import LRUCache

from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import ChameleonError, EngineError, UnavailableError
from cluster_router.wire.types import AdapterKey, Conditioning, TokenChunk, TokenizedRequest
from lm_workers.engine import Engine

log = logging.getLogger(__name__)

Outcome = TokenChunk | Exception


class AdapterSource(Protocol):
    """Where updates come from: an AdapterGenerator, or a handle to one."""

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        """The update named `key`."""
        ...


class LMWorker:
    """Serves streams from one engine, which runs in a thread of its own.

    Args:
        engine: owned by this worker from now on.
        adapters: asked for updates that are not at hand.
        delta_bytes: bytes of updates kept in host memory, so that a hot cluster costs no call.
    """

    def __init__(self, engine: Engine, adapters: AdapterSource, delta_bytes: int = 2**26) -> None:
        self._engine, self._adapters = engine, adapters
        self._deltas: LRUCache[str, LoraDelta] = LRUCache(delta_bytes, lambda one: one.nbytes)
        self._fetching: dict[str, asyncio.Task[LoraDelta]] = {}
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Outcome]]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """Requests running and waiting, as a hint."""
        return self._engine.num_running, self._engine.num_waiting

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of the updates at hand, least recently used first."""
        return tuple(self._deltas)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    async def generate(self, request: TokenizedRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream a request's chunks; closing the stream early aborts the request.

        Raises:
            ChameleonError: refused, or failed, as `Engine.add` and the adapter source say.
        """
        delta = await self._delta(request)
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        name = request.request_id
        loop = asyncio.get_running_loop()
        self._send(lambda: self._add(request, delta, loop, outcomes))
        try:
            while True:
                outcome = await outcomes.get()
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
                if outcome.finish_reason is not None:
                    return
        finally:
            self._send(lambda: self._drop(name, outcomes))

    def close(self) -> None:
        """Stop the thread; streams still open end with UnavailableError."""
        self._commands.put(None)
        self._thread.join()

    async def _delta(self, request: TokenizedRequest) -> LoraDelta | None:
        """The update of `request`. Requests that miss on the same one share a fetch."""
        assignment = request.assignment
        if assignment.key is None:
            return None
        name = assignment.key.id
        delta = self._deltas.pop(name, None)
        if delta is not None:
            self._deltas[name] = delta  # put back last: the order is that of use
            return delta
        if name not in self._fetching:
            fetch = self._fetch(assignment.key, assignment.conditioning)
            self._fetching[name] = asyncio.create_task(fetch)
        # A caller that goes away leaves the fetch running for the others.
        return await asyncio.shield(self._fetching[name])

    async def _fetch(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        try:
            delta = await self._adapters.get(key, conditioning)
        finally:
            del self._fetching[key.id]
        if delta.nbytes <= self._deltas.maxsize:
            self._deltas[key.id] = delta
        return delta

    def _send(self, command: Callable[[], None]) -> None:
        if not self._thread.is_alive():
            raise UnavailableError("this replica is shutting down")
        self._commands.put(command)

    # The rest runs in the engine's thread.

    def _run(self) -> None:
        while self._obey():
            if not self._engine.has_work:
                continue
            try:
                chunks = self._engine.step()
            except Exception:
                log.exception("an engine step failed; its requests are failed")
                for name in self._engine.abort_all():
                    self._deliver(name, EngineError("the engine failed; please retry"))
                continue
            for chunk in chunks:
                self._deliver(chunk.request_id, chunk)
        for name in self._engine.abort_all():
            self._deliver(name, UnavailableError("this replica is shutting down"))

    def _obey(self) -> bool:
        """Run waiting commands, waiting for one when idle; False once closed."""
        block = not self._engine.has_work
        while True:
            try:
                command = self._commands.get(block=block)
            except Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _add(
        self,
        request: TokenizedRequest,
        delta: LoraDelta | None,
        loop: asyncio.AbstractEventLoop,
        outcomes: asyncio.Queue[Outcome],
    ) -> None:
        try:
            self._engine.add(request, delta)
        except ChameleonError as refusal:
            loop.call_soon_threadsafe(outcomes.put_nowait, refusal)
        else:
            self._streams[request.request_id] = loop, outcomes

    def _drop(self, name: str, outcomes: asyncio.Queue[Outcome]) -> None:
        """Abort `name` if it is still the request that `outcomes` belongs to."""
        stream = self._streams.get(name)
        if stream is not None and stream[1] is outcomes:
            del self._streams[name]
            self._engine.abort(name)

    def _deliver(self, name: str, outcome: Outcome) -> None:
        loop, outcomes = self._streams[name]
        if not loop.is_closed():  # a reader that is gone must not end this thread
            loop.call_soon_threadsafe(outcomes.put_nowait, outcome)
