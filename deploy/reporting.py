"""What each replica reports: from the counts of plain objects to the meters of the table."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn

from cluster_router.tally import Key, StreamEnd
from cluster_router.traffic import OTHER as MERGED
from cluster_router.traffic import Traffic
from cluster_router.wire.types import TokenizedRequest
from deploy.metrics import NONE, OTHER, Meters

# Each of these brings with it what only its own replicas need: torch, model classes, FAISS.
if TYPE_CHECKING:
    from adapter_gen.generator import GeneratorStats
    from adapter_gen.refinery_worker import RefineryStatus
    from cluster_router.learning.worker import LearnerStatus
    from cluster_router.outbox import Outbox
    from lm_workers.engine import EngineStats

INTERVAL_S = 2.0
_PATIENCE_S = 5.0

logger = logging.getLogger(__name__)


async def report_every(interval_s: float, report: Callable[[], Awaitable[None]]) -> NoReturn:
    """Report for ever. What fails, or does not end, is logged once and tried again."""
    failing = False
    while True:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await report()
            failing = False
        except Exception:  # no report is a reason to stop serving
            if not failing:
                logger.exception("%s fails", report.__qualname__)
            failing = True
        await asyncio.sleep(interval_s)


class TrafficReporter:
    """A router's traffic: each stream when it ends, the rest now and then.

    Args:
        most: namespaces and clusters that get labels of their own, first come, first served: a
            series that Prometheus has seen stays until the process ends. All others share one.
        meters: what records; None are the table's.
    """

    def __init__(self, most: int, meters: Meters | None = None) -> None:
        self._meters = meters or Meters("ClusterRouter")
        self._most = most
        self._labels: dict[Key, dict[str, str]] = {}

    def ended(self, _: TokenizedRequest, end: StreamEnd) -> None:
        """Record one stream. A listener of Traffic."""
        meters, mode = self._meters, {"mode": end.adaptation.mode}
        who = self._of(Key(end.namespace, end.adaptation.cluster))
        meters.count("requests", 1, who | mode)
        meters.count("fallbacks", end.adaptation.fallback, who)
        meters.count("prompt_tokens", end.prompt_tokens, who)
        meters.count("cached_tokens", end.cached_tokens, who)
        meters.count("output_tokens", end.output_tokens, who)
        for name, value in (
            ("first_token_seconds", end.first_token_s),
            ("token_gap_seconds", end.token_gap_s),
            ("longest_gap_seconds", end.longest_gap_s),
            ("request_seconds", end.seconds),
            ("similarity", end.adaptation.similarity),
        ):
            if value is not None:
                meters.observe(name, value, mode)

    def report(self, traffic: Traffic) -> None:
        """Record what is not a stream's own."""
        report = traffic.report(())
        self._meters.set("streams_in_flight", report.total.in_flight)
        for code, count in report.total.errors.items():
            self._meters.total("errors", count, {"code": code})
        for one in report.clusters:
            if not one.gain or one.key == MERGED:
                continue
            who = self._of(one.key)
            if who["cluster"] != OTHER:
                self._meters.set("conditioning_gain_nats", sum(one.gain) / len(one.gain), who)
                self._meters.total("conditioning_gain_estimates", one.gains, who)

    def handed_on(self, receiver: str, outbox: Outbox[Any] | None) -> None:
        """Record what became of what was sent to the learner or the refinery."""
        if outbox is None:
            return
        for outcome in ("sent", "lost", "dropped"):
            labels = {"receiver": receiver, "outcome": outcome}
            self._meters.total("handed_on", getattr(outbox, outcome), labels)

    def _of(self, key: Key) -> dict[str, str]:
        labels = self._labels.get(key)
        if labels is None:
            if len(self._labels) >= self._most:
                return {"namespace": OTHER, "cluster": OTHER}
            cluster = NONE if key.cluster is None else str(key.cluster)
            labels = {"namespace": key.namespace or NONE, "cluster": cluster}
            self._labels[key] = labels
        return labels


class EngineReporter:
    """An LM replica's engine."""

    def __init__(self) -> None:
        self._meters = Meters("LMReplica")

    def report(self, stats: EngineStats) -> None:
        """Record what the engine does and has done."""
        meters = self._meters
        meters.set("running_requests", stats.running)
        meters.set("waiting_requests", stats.waiting)
        meters.set("tokens_ahead", stats.tokens_ahead)
        meters.set("kv_cache_use", 1 - stats.kv_free)
        meters.set("adapters_resident", stats.adapters)
        meters.total("engine_prompt_tokens", stats.prompt_tokens)
        meters.total("engine_cached_tokens", stats.cached_tokens)
        meters.total("engine_generated_tokens", stats.generated_tokens)
        meters.total("preemptions", stats.preemptions)
        meters.total("adapter_loads", stats.adapter_loads)
        meters.total("adapter_evictions", stats.adapter_evictions)


class GeneratorReporter:
    """An adapter generator."""

    def __init__(self) -> None:
        self._meters = Meters("AdapterGenerator")

    def report(self, stats: GeneratorStats) -> None:
        """Record what it does and has done."""
        meters = self._meters
        meters.set("updates_in_flight", stats.in_flight)
        meters.set("updates_cached", stats.entries)
        meters.set("update_cache_bytes", stats.bytes)
        meters.total("updates_generated", stats.generated)
        meters.total("update_seconds", stats.generation_seconds)
        meters.total("update_failures", stats.failed)
        meters.total("update_requests", stats.hits, {"outcome": "hit"})
        meters.total("update_requests", stats.misses, {"outcome": "miss"})


class LearnerReporter:
    """The learner."""

    def __init__(self) -> None:
        self._meters = Meters("CentroidLearner")

    def report(self, status: LearnerStatus) -> None:
        """Record what it has learned and published."""
        meters, now = self._meters, time.time()
        meters.total("embeddings_learned", status.learned)
        meters.total("embeddings_refused", status.refused)
        meters.set("publish_failing", len(status.failures))
        for namespace, published in status.published.items():
            labels = {"namespace": namespace or NONE}
            meters.set("clusters", published.clusters, labels)
            meters.set("snapshot_version", published.version, labels)
            meters.set("snapshot_age_seconds", max(0.0, now - published.at), labels)


class RefineryReporter:
    """The refinery."""

    def __init__(self) -> None:
        self._meters = Meters("ClusterRefinery")

    def report(self, status: RefineryStatus) -> None:
        """Record what it was given and made of it."""
        self._meters.total("prompts_offered", status.offered)
        for outcome in ("refined", "unchanged", "failed"):
            self._meters.total("refinements", getattr(status, outcome), {"outcome": outcome})
