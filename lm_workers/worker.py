"""LMWorker: the engine behind asynchronous streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from cachetools import LRUCache
from opentelemetry import trace

from adapter_gen.update import LoraDelta, UpdateSpec
from cluster_router.wire.errors import (
    ChameleonError,
    EngineError,
    OverloadedError,
    UnavailableError,
)
from cluster_router.wire.types import AdapterKey, Conditioning, TokenChunk, TokenizedRequest
from lm_workers.delivery import Outcome, Streams, call_in
from lm_workers.engine import EngineStats, Failure, SteppedEngine
from lm_workers.turns import Turns

log = logging.getLogger(__name__)
tracer = trace.get_tracer("chameleon.worker")

T = TypeVar("T")

_MOST_MISSING = 1024
_FORGET_S = 60.0
"""After so long an update is asked for once more: the first call is taken for lost."""

_MOST_FAILED, _BROKEN_S = 3, 5.0
"""Steps that fail in a row, and over how long, before the thread ends: that is no single request,
sent again and again, but an engine that stays broken."""


@dataclass(frozen=True, slots=True)
class _Fetch:
    """An update on its way, and since when."""

    task: asyncio.Task[LoraDelta]
    begun: float


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
        spec: form of the updates. With it a request whose update cannot be had, or not in time,
            runs under the static one; without it the request fails.
        hypernetwork: id of the one that generates them. A request of another's clusters, as there
            are while a bundle is being replaced, runs under the static update of this one.
        delta_bytes: bytes of updates kept in host memory, so that a hot cluster costs no call.
        patience_s: how long an update may take from when it is first asked for.
        niceness: added to that of the threads that compute. On a CPU they would otherwise hold up
            all that is short and urgent beside them: HTTP, routing, replicas that start.
        chunks_per_s: see Streams.
    """

    def __init__(
        self,
        engine: SteppedEngine,
        adapters: AdapterSource,
        spec: UpdateSpec | None = None,
        hypernetwork: str | None = None,
        delta_bytes: int = 2**26,
        patience_s: float = 5.0,
        niceness: int = 0,
        chunks_per_s: float | None = None,
    ) -> None:
        self._engine, self._adapters, self._niceness = engine, adapters, niceness
        self._spec, self._hypernetwork, self._patience_s = spec, hypernetwork, patience_s
        self._deltas: LRUCache[str, LoraDelta] = LRUCache(delta_bytes, lambda one: one.nbytes)
        self._fetching: dict[str, _Fetch] = {}
        # Updates that could not be had when last asked for, so that it is logged once.
        self._missing: LRUCache[str, None] = LRUCache(_MOST_MISSING)
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._streams = Streams(chunks_per_s)
        self._turns = Turns()
        self._ended, self._gate = False, threading.Lock()
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
        """Whether the engine's thread runs; it ends when the engine fails again and again."""
        return self._thread.is_alive()

    async def stats(self) -> EngineStats:
        """What the engine does now and has done, as of its next moment between two steps."""
        return await self._between_steps(lambda: self._engine.stats)

    async def check_integrity(self) -> EngineStats:
        """The same, once it is sure that nothing is lost or held twice.

        Raises:
            AssertionError: something is.
        """

        def check() -> EngineStats:
            self._engine.check_integrity()
            assert len(self._streams) == self._engine.num_running + self._engine.num_waiting
            return self._engine.stats

        return await self._between_steps(check)

    async def _between_steps(self, ask: Callable[[], T]) -> T:
        """What `ask` gives or raises in the engine's thread."""
        loop = asyncio.get_running_loop()
        told: asyncio.Future[T] = loop.create_future()

        def settle(answer: T | None, error: Exception | None) -> None:
            if told.done():
                return
            if error is None:
                told.set_result(answer)  # type: ignore[arg-type]
            else:
                told.set_exception(error)

        def tell() -> None:
            try:
                answer, error = ask(), None
            except Exception as raised:
                answer, error = None, raised
            call_in(loop, settle, answer, error)

        self._send(tell)
        return await told

    async def generate(self, request: TokenizedRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream a request's chunks; closing the stream early aborts the request.

        Raises:
            ChameleonError: refused, or failed, as `Engine.add` and the adapter source say.
        """
        with tracer.start_as_current_span("chameleon.update", record_exception=False):
            delta, stand_in = await self._update(request)
        span = tracer.start_span("chameleon.compute")
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        name = request.request_id
        loop = asyncio.get_running_loop()
        begun = False
        self._send(lambda: self._add(request, delta, loop, outcomes))
        try:
            while True:
                chunk = await outcomes.get()
                if isinstance(chunk, Exception):
                    raise chunk
                if not begun:
                    begun = True
                    span.add_event("first chunk")
                if stand_in is not None:
                    chunk, stand_in = replace(chunk, stand_in=stand_in), None
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            span.end()
            with contextlib.suppress(UnavailableError):  # nothing is left to drop
                self._send(lambda: self._drop(name, outcomes))

    def close(self) -> None:
        """Stop the thread; streams still open end with UnavailableError."""
        self._commands.put(None)
        self._thread.join()

    async def _update(
        self, request: TokenizedRequest
    ) -> tuple[LoraDelta | None, AdapterKey | None]:
        """What `request` runs under; and its key, if that stands in for what was asked for."""
        key, spec = request.assignment.key, self._spec
        if key is None:
            return None, None
        if spec is None:
            return await self._delta(key, request.assignment.conditioning)
        own = self._hypernetwork or key.hypernetwork
        static = replace(key, hypernetwork=own, cluster=None, version=0, refinement="")
        if key == static:
            return LoraDelta.static(static, spec), None  # the same everywhere: nobody to ask
        if key.hypernetwork != own:
            return LoraDelta.static(static, spec), static
        try:
            return await self._delta(key, request.assignment.conditioning)
        except Exception as error:  # whatever befell it there or on the way here
            if key.id not in self._missing:
                log.warning(
                    "cluster %s runs under the static update, its own (%s) cannot be had: %r",
                    key.cluster,
                    key.id,
                    error,
                )
            self._missing[key.id] = None
            return LoraDelta.static(static, spec), static

    async def _delta(
        self, key: AdapterKey, conditioning: Conditioning | None
    ) -> tuple[LoraDelta, AdapterKey | None]:
        """See `_update`. Requests that miss on the same update share a fetch, and its time."""
        delta = self._deltas.pop(key.id, None)
        if delta is not None:
            self._deltas[key.id] = delta  # put back last: the order is that of use
            return delta, None
        clock = asyncio.get_running_loop().time
        fetch = self._fetching.get(key.id)
        if fetch is not None and clock() > fetch.begun + max(_FORGET_S, 2 * self._patience_s):
            fetch.task.cancel()  # nobody waits for it any more
            fetch = None
        if fetch is None:
            task = asyncio.create_task(self._fetch(key, conditioning))
            task.add_done_callback(_retrieved)
            fetch = self._fetching[key.id] = _Fetch(task, clock())
        # A caller that goes away, or waits no longer, leaves the fetch running for the others.
        async with asyncio.timeout_at(fetch.begun + self._patience_s):
            delta = await asyncio.shield(fetch.task)
        return delta, None if delta.key == key else delta.key

    async def _fetch(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        own = asyncio.current_task()
        try:
            delta = await self._adapters.get(key, conditioning)
        finally:
            if (held := self._fetching.get(key.id)) is not None and held.task is own:
                del self._fetching[key.id]
        if self._spec is not None:
            delta.check(self._spec)
        self._missing.pop(key.id, None)
        # What stands in for a refined update is not kept: that one may be there again.
        if delta.key == key and delta.nbytes <= self._deltas.maxsize:
            self._deltas[key.id] = delta
        return delta

    def _send(self, command: Callable[[], None]) -> None:
        with self._gate:
            if self._ended:
                raise UnavailableError("this replica is shutting down")
            self._commands.put(command)

    # The rest runs in the engine's thread.

    def _run(self) -> None:
        try:
            # On Linux this is the thread's own, and that of the threads which its kernels start.
            os.nice(self._niceness)
            self._serve()
        except Exception:
            log.exception("the engine's thread failed and ends")
        finally:
            self._end()

    def _serve(self) -> None:
        """Obey and step until closed, or until the engine is broken."""
        failed, since = 0, 0.0
        while self._obey():
            if not self._engine.has_work:
                continue
            try:
                outcomes = self._engine.step()
            except Exception:
                failed, since = failed + 1, since if failed else time.monotonic()
                log.exception("an engine step failed; its requests are failed")
                self._engine.abort_all()
                lost = EngineError("the engine failed; please retry")
                self._deliver([(name, lost) for name in self._streams])
                if failed >= _MOST_FAILED and time.monotonic() - since >= _BROKEN_S:
                    log.critical("%d engine steps failed in a row: this replica gives up", failed)
                    return
                continue
            failed = 0
            self._deliver(
                (one.request_id, one.error if isinstance(one, Failure) else one) for one in outcomes
            )

    def _end(self) -> None:
        """Tell everybody that there will be no more; none may wait for a thread that is gone."""
        with self._gate:
            self._ended = True
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                with contextlib.suppress(Exception):  # like below, it may fail because that did
                    command()
        lost = UnavailableError("this replica is shutting down")
        self._deliver([(name, lost) for name in self._streams])
        with contextlib.suppress(Exception):
            self._engine.abort_all()

    def _obey(self) -> bool:
        """Run waiting commands, waiting for one when idle; False once closed."""
        block = not self._engine.has_work
        if block:
            self._turns.idle()
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
        refusal: ChameleonError
        try:
            self._engine.add(request, delta)
            self._streams.open(request.request_id, loop, outcomes)
            return
        except OverloadedError as full:
            turn_s = self._turns.next_in(self._engine.num_waiting)
            refusal = OverloadedError(full.message, full.param, turn_s)
        except ChameleonError as refused:
            refusal = refused
        except Exception:
            log.exception("the engine failed to take request %s", request.request_id)
            refusal = EngineError("the engine failed to take this request")
        call_in(loop, outcomes.put_nowait, refusal)

    def _drop(self, name: str, outcomes: asyncio.Queue[Outcome]) -> None:
        """Abort `name` if it is still the request that `outcomes` belongs to."""
        if self._streams.close(name, outcomes):
            self._engine.abort(name)

    def _deliver(self, told: Iterable[tuple[str, Outcome]]) -> None:
        """Tell streams what came for them, as far as it is due."""
        for _ in range(self._streams.deliver(told)):
            self._turns.ended(self._engine.num_waiting)


def _retrieved(task: asyncio.Task[LoraDelta]) -> None:
    """Nobody may be left to hear of a failure; that is no fault of the program."""
    if not task.cancelled():
        task.exception()
