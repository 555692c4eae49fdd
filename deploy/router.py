"""The router replica: the front door's parts, put together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_gen.bundle import Bundle
from cluster_router.clusters import Assigner
from cluster_router.console.increments import Increments
from cluster_router.console.layout import ClusterMap
from cluster_router.console.reporter import PERIOD_S, RouterReporter
from cluster_router.delivery import Delivery
from cluster_router.embedding import TokenEmbedder
from cluster_router.gain import GainProbe
from cluster_router.http import build_app
from cluster_router.index import FaissIndex
from cluster_router.prompts import PromptEncoder
from cluster_router.request_log import LoggedWorker, RequestLog
from cluster_router.router import ClusterRouter, ServedModel, Worker
from cluster_router.stream_log import log_stream
from cluster_router.tracing import trace_stream
from cluster_router.traffic import Traffic
from cluster_router.vocabulary import CharacteristicTokens
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import (
    DEFAULT_NAMESPACE,
    Assignment,
    ClusterInfo,
    GenerateRequest,
    GenerateResult,
    TokenChunk,
)
from deploy.config import AppConfig, RequestLogConfig
from deploy.console import RemoteBoard, here
from deploy.fit import load_bundle
from deploy.learning import RouterLearning
from deploy.logs import join_serve
from deploy.refining import RouterRefining
from deploy.remote import RemoteGenerator, RemoteWorker
from deploy.reporting import INTERVAL_S, TrafficReporter, report_every
from lm_workers.models import (
    ModelInfo,
    describe_model,
    load_embedding,
    load_tokenizer,
    resolve_model,
)


class RouterReplica:
    """Serves a ClusterRouter, over HTTP and to Python handles."""

    def __init__(
        self,
        config: AppConfig,
        lm: DeploymentHandle,
        generator: DeploymentHandle | None,
        learner: DeploymentHandle | None,
        refinery: DeploymentHandle | None,
        board: DeploymentHandle | None = None,
    ) -> None:
        join_serve()
        self._config = config
        self._access = config.access.build()
        path = resolve_model(config.model)
        info = describe_model(path, config.name)
        bundle = load_bundle(config, info)
        embedding = load_embedding(path)
        prompts = _prompts(config, path, info, bundle)
        self._lm = RemoteWorker(lm, info.fingerprint)
        self._refining = RouterRefining(config, bundle, refinery, prompts.lead)
        describe = CharacteristicTokens(embedding, prompts.token_text)
        assigner = partial(_assigner, config, info, bundle, describe, self._refining)
        self._learning = RouterLearning(config.learner, bundle, learner, assigner)
        worker = Delivery(self._lm, config.router.attempts, timeout_s=config.router.timeout_s)
        self._watch(worker)
        self._log = _request_log(config.request_log, prompts.text)
        self._router = ClusterRouter(
            model=_served(config, info),
            prompts=prompts,
            embedder=TokenEmbedder(embedding, None if bundle is None else bundle.token_weights),
            assigners=self._learning.assigners,
            worker=worker if self._log is None else LoggedWorker(worker, self._log),
            exporter=RemoteGenerator(generator),
            observers=(self._learning.observe, self._refining.observe),
            traffic=self._traffic,
        )
        self._start(board, _snapshot(info, bundle))

    def _watch(self, worker: Worker) -> None:
        """Make what counts the traffic; the probe of its gain asks `worker`."""
        metrics = self._config.metrics
        self._reporter = TrafficReporter(metrics.max_clusters)
        self._increments = Increments()
        listeners = [self._reporter.ended, log_stream, trace_stream, self._increments.listen]
        self._traffic = Traffic(listeners=listeners)
        self._probe = GainProbe(worker, self._traffic.gained, metrics.gain_share)
        listeners.append(self._probe.ended)

    def _start(self, board: DeploymentHandle | None, snapshot: ClusterSnapshot) -> None:
        """Begin what goes on beside requests."""
        running = [report_every(INTERVAL_S, self._report), self._probe.run()]
        if self._log is not None:
            running.append(self._log.run(self._config.request_log.interval_s))
        self._board = None if board is None else RemoteBoard(board)
        if self._board is not None:
            reporter = RouterReporter(
                here(),
                self._board,
                self._traffic,
                self._increments,
                self._learning.assigners,
                ClusterMap(snapshot.centroids, snapshot.mean),
            )
            running.append(report_every(PERIOD_S, reporter.report))
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(one) for one in running]

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The HTTP API, built by Serve once the replica exists."""
        return build_app(
            lambda: self._router,
            self._readiness,
            self._config.router.chat_max_tokens,
            return_request_id=False,  # Serve's proxy returns it
            access=self._access,
            max_body_bytes=self._config.access.max_body_bytes,
            console=None if self._board is None else self._board.state,
        )

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """See ClusterRouter.generate."""
        return await self._router.generate(request)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """See ClusterRouter.stream."""
        async with aclosing(self._router.stream(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def assign(self, request: GenerateRequest) -> Assignment:
        """See ClusterRouter.assign."""
        return await self._router.assign(request)

    async def clusters(self, namespace: str = DEFAULT_NAMESPACE) -> list[ClusterInfo]:
        """See ClusterRouter.clusters."""
        return await self._router.clusters(namespace)

    async def _report(self) -> None:
        self._reporter.report(self._traffic)
        self._reporter.handed_on("learner", self._learning.outbox)
        self._reporter.handed_on("refinery", self._refining.outbox)

    async def _readiness(self) -> str | None:
        return None if await self._lm.ready() else "the engine's thread has ended"


def _context_length(config: AppConfig, info: ModelInfo) -> int:
    return min(config.engine.max_context or info.context_length, info.context_length)


def _served(config: AppConfig, info: ModelInfo) -> ServedModel:
    return ServedModel(
        name=config.name,
        created=int(time.time()),
        context_length=_context_length(config, info),
        vocab_size=info.vocab_size,
    )


def _prompts(
    config: AppConfig, path: Path, info: ModelInfo, bundle: Bundle | None
) -> PromptEncoder:
    # As many tokens of a prompt, from its start, choose its cluster as in training.
    embedded = None if bundle is None or bundle.embedding is None else bundle.embedding.tokens
    return PromptEncoder(
        load_tokenizer(path),
        _context_length(config, info),
        info.vocab_size,
        embedded or info.context_length,
    )


def _snapshot(info: ModelInfo, bundle: Bundle | None) -> ClusterSnapshot:
    return ClusterSnapshot.empty(info.hidden_size) if bundle is None else bundle.snapshot


def _assigner(
    config: AppConfig,
    info: ModelInfo,
    bundle: Bundle | None,
    describe: CharacteristicTokens,
    refining: RouterRefining,
    namespace: str,
) -> Assigner:
    """Chooses among the bundle's clusters for one namespace."""
    return Assigner(
        snapshot=_snapshot(info, bundle),
        index_factory=lambda rows: FaissIndex(rows, config.router.index_device),
        base=info.fingerprint,
        hypernetwork=None if bundle is None else bundle.hypernetwork_id,
        describe=describe,
        described_from=config.router.described_from,
        refined=partial(refining.refined, namespace),
    )


def _request_log(
    config: RequestLogConfig, decode: Callable[[Sequence[int]], str]
) -> RequestLog | None:
    """Where this router logs; None where nobody's requests are logged."""
    if config.uri is None or not config.namespaces:
        return None
    writer = serve.get_replica_context().replica_id.unique_id
    return RequestLog(config.uri, writer, config.allows, decode, config.max_bytes)
