"""AdapterGenerator: the update of a cluster, generated once however many ask for it."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from opentelemetry import trace

from adapter_gen.bundle import Bundle
from adapter_gen.cache import DeltaCache
from adapter_gen.codec import decode_delta
from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import BundleError, ConfigError, DeltaError
from cluster_router.wire.types import AdapterKey, Conditioning

LoadRefined = Callable[[str], bytes | None]
"""Reads the refined update with a content id, as `codec.encode_delta` wrote it; None where it is
gone. BundleError where it is damaged; one caused by an OSError, or any other error, where it cannot
be read now."""

logger = logging.getLogger(__name__)
tracer = trace.get_tracer("chameleon.generator")


@dataclass(frozen=True, slots=True)
class GeneratorStats:
    """Counters since the start, and what is held now.

    Attributes:
        hits: requests answered from the cache.
        misses: requests that had to wait for a generation, their own or one under way.
        generated: updates generated; less than `misses` where several waited for one.
        failed: generations that failed.
        in_flight: updates being generated, or waiting to be.
        evicted: updates dropped from the cache to make room.
        entries: updates held.
        bytes: bytes held.
        generation_seconds: wall time of all generations, queueing included.
    """

    hits: int
    misses: int
    generated: int
    failed: int
    in_flight: int
    evicted: int
    entries: int
    bytes: int
    generation_seconds: float


class AdapterGenerator:
    """Generates and caches updates for one bundle. Lives on one event loop.

    Args:
        bundle: the hypernetwork and what it belongs to.
        max_bytes: how much generated updates may hold in memory.
        device: where the hypernetwork runs.
        refined: where refined updates come from.

    Raises:
        ConfigError: `max_bytes` does not hold one update.
    """

    def __init__(
        self,
        bundle: Bundle,
        max_bytes: int = 2**28,
        device: str = "cpu",
        refined: LoadRefined | None = None,
    ) -> None:
        needed = 2 * bundle.spec.numbers_per_cluster
        if max_bytes < needed:
            raise ConfigError(f"max_bytes is {max_bytes}, one update takes {needed}", "max_bytes")
        self.bundle = bundle
        self._hypernetwork = copy.deepcopy(bundle.hypernetwork).to(device)
        self._device = device
        self._refined = refined
        self._cache = DeltaCache(max_bytes)
        self._in_flight: dict[AdapterKey, asyncio.Task[LoraDelta]] = {}
        # One thread: torch spreads one generation over the cores, two would only contend.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-generator")
        # And one that waits for the storage: where that hangs, clusters never refined need not.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="refined-reader")
        self._hits = self._misses = self._generated = self._failed = 0
        self._seconds = 0.0

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        """The update named `key`, from the cache or generated now.

        Callers that miss on the same key share one generation; a caller that is cancelled leaves
        it running for the others. A failure reaches all of them and is forgotten, so that the
        next caller tries again. Once cached, a key answers whatever conditioning comes with it.

        Args:
            key: names base model, hypernetwork, cluster and version; cluster None is the static
                update.
            conditioning: the cluster's statistics; not looked at for the static update.

        Raises:
            DeltaError: the key belongs to another base or hypernetwork, the conditioning is
                missing, misshapen or not finite, or the generated update is not finite.
            Exception: it was refined and cannot be read now; whatever the storage raises.
        """
        self._check_key(key)
        cached = self._cache.get(key)
        if cached is not None:
            self._hits += 1
            return cached
        self._misses += 1
        task = self._in_flight.get(key)
        if task is None:
            task = asyncio.create_task(self._generate_and_keep(key, conditioning))
            self._in_flight[key] = task
        return await asyncio.shield(task)

    def generate(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        """Generate one update here and now, past the cache. Raises as `get` does.

        One that has been refined is read instead. Where that is gone or damaged, the cluster's
        requests run under what the hypernetwork makes of it until it is refined again; this has a
        key of its own, since equal keys mean equal weights.
        """
        self._check_key(key)
        found = self._load_refined(key) if key.refinement else None
        return self._generate(key, conditioning) if found is None else found

    def stats(self) -> GeneratorStats:
        """Counters and sizes at this moment."""
        return GeneratorStats(
            hits=self._hits,
            misses=self._misses,
            generated=self._generated,
            failed=self._failed,
            in_flight=len(self._in_flight),
            evicted=self._cache.evicted,
            entries=len(self._cache),
            bytes=int(self._cache.currsize),
            generation_seconds=self._seconds,
        )

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of the updates held, first those that came first."""
        return tuple(key.id for key in self._cache)

    def close(self) -> None:
        """Let a running generation end and stop the threads."""
        self._thread.shutdown(cancel_futures=True)
        self._reader.shutdown(cancel_futures=True)

    async def _generate_and_keep(
        self, key: AdapterKey, conditioning: Conditioning | None
    ) -> LoraDelta:
        started = time.perf_counter()
        try:
            with tracer.start_as_current_span("chameleon.generate_update"):
                delta = await self._generate_in_thread(key, conditioning)
            if delta.key == key:  # else it stands in: the refined one may be there again
                self._cache[key] = delta
        except Exception:
            self._failed += 1
            raise
        finally:
            del self._in_flight[key]
        self._generated += 1
        self._seconds += time.perf_counter() - started
        return delta

    async def _generate_in_thread(
        self, key: AdapterKey, conditioning: Conditioning | None
    ) -> LoraDelta:
        """As `generate`, for a key that is checked."""
        loop = asyncio.get_running_loop()
        if key.refinement:
            found = await loop.run_in_executor(self._reader, self._load_refined, key)
            if found is not None:
                return found
        return await loop.run_in_executor(self._thread, self._generate, key, conditioning)

    @torch.inference_mode()
    def _generate(self, key: AdapterKey, conditioning: Conditioning | None) -> LoraDelta:
        spec = self.bundle.spec
        if key.cluster is None:
            return LoraDelta.static(key, spec)
        if conditioning is None:
            raise DeltaError(f"the update of cluster {key.cluster} needs its conditioning")
        vector = torch.tensor(conditioning.vector, dtype=torch.float32)[None]
        support = torch.tensor([conditioning.support], dtype=torch.float32)
        self._hypernetwork.check(vector, support)
        generated = self._hypernetwork(vector.to(self._device), support.to(self._device))
        return generated.delta(0, _unrefined(key, conditioning), spec)

    def _load_refined(self, key: AdapterKey) -> LoraDelta | None:
        """None where it is gone or damaged."""
        try:
            data = None if self._refined is None else self._refined(key.refinement)
            if data is not None:
                return decode_delta(data, key, self.bundle.spec)
        except BundleError as error:
            if isinstance(error.__cause__, OSError):
                raise
            logger.error("cluster %s is not served refined: %s", key.cluster, error)
        else:
            logger.warning("refinement %s of cluster %s is gone", key.refinement, key.cluster)
        return None

    def _check_key(self, key: AdapterKey) -> None:
        if key.base != self.bundle.fingerprint:
            raise DeltaError(
                f"update {key.id} is for base model {key.base}, "
                f"this generator serves {self.bundle.fingerprint}"
            )
        if key.hypernetwork != self.bundle.hypernetwork_id:
            raise DeltaError(
                f"update {key.id} is of hypernetwork {key.hypernetwork}, "
                f"this generator serves {self.bundle.hypernetwork_id}; load the same bundle"
            )


def _unrefined(key: AdapterKey, conditioning: Conditioning) -> AdapterKey:
    """Names what is generated for `key`: the key itself, unless that is of a refined update."""
    if not key.refinement:
        return key
    seen = np.append(conditioning.vector, conditioning.support).astype(np.float32).tobytes()
    return replace(key, refinement=f"instead-{hashlib.sha256(seen).hexdigest()[:16]}")
