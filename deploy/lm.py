"""The LM replica: an engine, and what it tells of itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import ray
from ray.serve.handle import DeploymentHandle

from adapter_gen.update import SharedBases, UpdateSpec
from cluster_router.console.reports import EngineReport, Place
from cluster_router.wire.errors import UnavailableError
from cluster_router.wire.types import TokenChunk, TokenizedRequest
from deploy.affinity import BASE, routing_stats
from deploy.config import AppConfig
from deploy.console import RemoteBoard, telling
from deploy.fit import load_bundle
from deploy.logs import join_serve
from deploy.placement import check_gpus, lm_chunks_per_s, lm_niceness
from deploy.remote import RemoteGenerator
from deploy.reporting import INTERVAL_S, EngineReporter, report_every
from lm_workers.build import build_engine
from lm_workers.device import in_passing_thread
from lm_workers.engine import EngineStats
from lm_workers.models import ModelInfo, describe_model, resolve_model
from lm_workers.vllm.config import VllmConfig
from lm_workers.worker import LMWorker


class LMReplica:
    """Serves an engine."""

    def __init__(
        self,
        config: AppConfig,
        generator: DeploymentHandle | None,
        board: DeploymentHandle | None = None,
    ) -> None:
        join_serve()
        if ray.is_initialized():
            given = ray.get_runtime_context().get_assigned_resources()
            check_gpus(config.engine, given.get("GPU", 0))
        path = resolve_model(config.model)
        info = describe_model(path, config.name)
        self._base = info.fingerprint
        update, hypernetwork = in_passing_thread(partial(_load_update, config, info))
        build = partial(build_engine, path, config.engine, update)
        # vLLM sets up its threads and processes itself, from the thread that builds it.
        foreign = isinstance(config.engine, VllmConfig)
        engine = build() if foreign else in_passing_thread(build)
        self._worker = LMWorker(
            engine,
            RemoteGenerator(generator),
            None if update is None else update[0],
            hypernetwork,
            patience_s=config.generator.patience_s,
            niceness=lm_niceness(config.engine),
            chunks_per_s=lm_chunks_per_s(config),
        )
        self._reporter = EngineReporter()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(report_every(INTERVAL_S, self._report)),
            *telling(board, self._tell),
        ]

    async def generate(self, request: TokenizedRequest, base: str) -> AsyncIterator[TokenChunk]:
        """See LMWorker.generate. `base` is the base model that `request` is tokenised for.

        Raises:
            UnavailableError: this replica serves another one.
        """
        if base != self._base:
            raise UnavailableError(
                f"This request was tokenised for base model {base}, the LM replica serves "
                f"{self._base}: the application's model is being replaced. Send it again; deploy "
                "another model under a name and route of its own to have both."
            )
        chunks = self._worker.generate(request)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def record_routing_stats(self) -> dict[str, Any]:
        """What this replica has at hand and serves, for the request router."""
        return {**routing_stats(self._worker.resident), BASE: self._base}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deploy/autoscaling.py` counts: tokens still to compute, share of KV in use."""
        stats = await self._worker.stats()
        return {"tokens": stats.tokens_ahead, "kv_use": 1 - stats.kv_free}

    async def _report(self) -> None:
        self._reporter.report(await self._worker.stats())

    async def _tell(self, board: RemoteBoard, place: Place) -> None:
        stats = await self._worker.stats()
        report = EngineReport(
            running=stats.running,
            waiting=stats.waiting,
            tokens_ahead=stats.tokens_ahead,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            preemptions=stats.preemptions,
            kv_use=1 - stats.kv_free,
            updates=len(self._worker.resident),
        )
        await board.hear_engine(place, report)

    async def check_integrity(self) -> EngineStats:
        """See LMWorker.check_integrity."""
        return await self._worker.check_integrity()

    async def ready(self) -> bool:
        """True as soon as there is a replica to say so."""
        return self._worker.alive

    def check_health(self) -> None:
        """Let Serve replace a replica whose engine thread has died."""
        if not self._worker.alive:
            raise UnavailableError("the engine's thread has ended")


def _load_update(
    config: AppConfig, info: ModelInfo
) -> tuple[tuple[UpdateSpec, SharedBases] | None, str | None]:
    """The form and the shared parts of updates, and the id of what generates the rest."""
    bundle = load_bundle(config, info)
    if bundle is None:
        return None, None
    return (bundle.spec, bundle.bases), bundle.hypernetwork_id
