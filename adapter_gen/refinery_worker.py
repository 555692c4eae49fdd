"""RefineryWorker: a ClusterRefinery behind an event loop, refining in one thread."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn, Protocol

from adapter_gen.codec import encode_delta
from adapter_gen.refinery import ClusterRefinery, Offered, RefineryConfig
from adapter_gen.update import UpdateSpec
from cluster_router.wire.types import COMMON, Place

_MOST_WAITING = 4096

logger = logging.getLogger(__name__)


class Refinements(Protocol):
    """Keeps refined updates; see RefinementStore."""

    def save(self, place: Place, data: bytes) -> None:
        """Keep a refinement of a place as its newest."""
        ...

    def trim(self, most: int, held: Collection[Place]) -> None:
        """Keep those of at most so many places, of the held ones first."""
        ...


@dataclass(frozen=True, slots=True)
class RefineryStatus:
    """What a refinery has done since it started, and how it fares.

    Attributes:
        offered: prompts it was given.
        refined: updates refined and kept.
        unchanged: refinements that gained nothing, so that the update stayed as it was.
        failed: refinements that came to nothing; the log says why.
    """

    offered: int
    refined: int
    unchanged: int
    failed: int


class RefineryWorker:
    """Takes prompts at any time; refines one thing after the other, in a thread.

    Args:
        refinery: owned by this worker from now on.
        store: where refined updates are kept.
        spec: form of the updates.
        config: the refinery's; its `max_clusters` bounds the store too.
    """

    def __init__(
        self,
        refinery: ClusterRefinery,
        store: Refinements,
        spec: UpdateSpec,
        config: RefineryConfig,
    ) -> None:
        self._refinery = refinery
        self._store = store
        self._spec = spec
        self._max_clusters = config.max_clusters
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refinery")
        self._waiting: deque[Offered] = deque(maxlen=_MOST_WAITING)
        self._some = asyncio.Event()
        self._offered = self._refined = self._unchanged = self._failed = 0

    async def offer(self, offered: Iterable[Offered]) -> None:
        """Take prompts, and return at once."""
        for one in offered:
            self._waiting.append(one)
            self._offered += 1
        self._some.set()

    async def run(self) -> NoReturn:
        """Refine what is due, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            self._some.clear()
            while await loop.run_in_executor(self._thread, self._step):
                pass

    def status(self) -> RefineryStatus:
        """Counts at this moment."""
        return RefineryStatus(self._offered, self._refined, self._unchanged, self._failed)

    def close(self) -> None:
        """Let a running refinement end, and stop the thread."""
        self._thread.shutdown(cancel_futures=True)

    # The rest runs in the thread.

    def _step(self) -> bool:
        """Refine what is due; False if nothing is."""
        while self._waiting:
            self._refinery.offer(self._waiting.popleft())
        place = self._refinery.due()
        if place is None:
            return False
        try:
            found = self._refinery.refine(place)
            if not found:
                self._unchanged += 1
            for one, (key, refined) in found.items():
                self._store.save(one, encode_delta(refined.delta(0, key, self._spec)))
                self._refined += 1
            if found:
                self._store.trim(self._max_clusters, self._refinery.held())
        except Exception as error:  # whatever the client of an object store raises
            self._failed += 1
            logger.error("%s keeps the update it has: %s", _named(place), str(error) or repr(error))
        return True


def _named(place: Place) -> str:
    return "what is common to a tenant" if place[1] == COMMON else f"cluster {place[1]}"
