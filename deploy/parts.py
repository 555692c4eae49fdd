"""Router, generator and LM replicas: what each builds.

The classes are plain; `deploy/app.py` decorates and binds them. Each wraps an object that knows
nothing of Ray.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import ray
from cachetools import LRUCache
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from adapter_gen.bundle import Bundle
from adapter_gen.export import export_peft, zip_files
from adapter_gen.generator import AdapterGenerator
from cluster_router.clusters import Assigner
from cluster_router.console.increments import Increments
from cluster_router.console.layout import ClusterMap
from cluster_router.console.reporter import PERIOD_S, RouterReporter
from cluster_router.console.reports import EngineReport, GeneratorReport, Place
from cluster_router.delivery import Delivery
from cluster_router.embedding import TokenEmbedder
from cluster_router.gain import GainProbe
from cluster_router.http import build_app
from cluster_router.index import FaissIndex
from cluster_router.prompts import PromptEncoder
from cluster_router.request_log import LoggedWorker, RequestLog
from cluster_router.router import ClusterRouter, ServedModel
from cluster_router.stream_log import log_stream
from cluster_router.tracing import trace_stream
from cluster_router.traffic import Traffic
from cluster_router.vocabulary import CharacteristicTokens
from cluster_router.wire.errors import BundleError, UnavailableError
from cluster_router.wire.forms import ExportForm
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import (
    DEFAULT_NAMESPACE,
    AdapterKey,
    Assignment,
    ClusterInfo,
    Conditioning,
    GenerateRequest,
    GenerateResult,
    TokenChunk,
    TokenizedRequest,
)
from deploy.affinity import routing_stats
from deploy.config import AppConfig, RequestLogConfig
from deploy.console import RemoteBoard, here, telling
from deploy.learning import RouterLearning
from deploy.logs import join_serve
from deploy.refining import RouterRefining, refinement_store
from deploy.remote import RemoteGenerator, RemoteWorker
from deploy.reporting import (
    INTERVAL_S,
    EngineReporter,
    GeneratorReporter,
    TrafficReporter,
    report_every,
)
from lm_workers.build import build_engine
from lm_workers.engine import EngineStats
from lm_workers.models import (
    ModelInfo,
    describe_model,
    load_embedding,
    load_lm_head,
    load_tokenizer,
    resolve_model,
)
from lm_workers.worker import LMWorker


def _load_bundle(config: AppConfig, info: ModelInfo) -> Bundle | None:
    path = config.bundle_path
    return None if path is None else Bundle.load(path, info.fingerprint)


def _embedded_tokens(bundle: Bundle | None, context_length: int) -> int:
    """How many tokens of a prompt, from its start, choose its cluster: as many as in training."""
    tokens = None if bundle is None or bundle.embedding is None else bundle.embedding.tokens
    return tokens or context_length


def _request_log(
    config: RequestLogConfig, decode: Callable[[Sequence[int]], str]
) -> RequestLog | None:
    """Where this router logs; None where nobody's requests are logged."""
    if config.uri is None or not config.namespaces:
        return None
    writer = serve.get_replica_context().replica_id.unique_id
    return RequestLog(config.uri, writer, config.allows, decode, config.max_bytes)


class GeneratorReplica:
    """Serves an AdapterGenerator: updates as numpy in the object store."""

    def __init__(self, config: AppConfig, board: DeploymentHandle | None = None) -> None:
        join_serve()
        self._path = resolve_model(config.model)
        self._base_model = config.model
        bundle = _load_bundle(config, describe_model(self._path, config.name))
        if bundle is None:
            raise BundleError("there is no bundle to generate from; set `bundle`")
        self._bundle = bundle
        self._generator = AdapterGenerator(
            bundle,
            config.generator.cache_bytes,
            config.generator.device,
            None if (store := refinement_store(config, bundle)) is None else store.load,
        )
        # One object a key, however many replicas ask; the store keeps it while the ref lives.
        self._refs: LRUCache[str, ray.ObjectRef] = LRUCache(
            max(1, config.generator.cache_bytes // (2 * bundle.spec.numbers_per_cluster))
        )
        self._reporter = GeneratorReporter()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(report_every(INTERVAL_S, self._report)),
            *telling(board, self._tell),
        ]

    async def get(self, key: AdapterKey, conditioning: Conditioning | None) -> list[ray.ObjectRef]:
        """A reference to the update `key`, in a list so that Serve does not resolve it."""
        delta = await self._generator.get(key, conditioning)
        if key.id not in self._refs:
            self._refs[key.id] = ray.put(delta)
        return [self._refs[key.id]]

    async def record_routing_stats(self) -> dict[str, list[str]]:
        """What this replica has at hand, for the request router."""
        return routing_stats(self._refs)

    async def _report(self) -> None:
        self._reporter.report(self._generator.stats())

    async def _tell(self, board: RemoteBoard, place: Place) -> None:
        stats = self._generator.stats()
        report = GeneratorReport(stats.generated, stats.failed, stats.in_flight, stats.entries)
        await board.hear_generator(place, report)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `deploy/autoscaling.py` counts: updates being generated, or waiting to be."""
        return {"misses": self._generator.stats().in_flight}

    async def export(
        self, key: AdapterKey, conditioning: Conditioning | None, form: ExportForm
    ) -> bytes:
        """The update as a zip archive of a PEFT adapter."""
        delta = await self._generator.get(key, conditioning)
        bundle = self._bundle
        head = load_lm_head(self._path)
        return zip_files(
            export_peft(delta, bundle.spec, bundle.bases, self._base_model, head, form=form)
        )


class LMReplica:
    """Serves an engine."""

    def __init__(
        self,
        config: AppConfig,
        generator: DeploymentHandle | None,
        board: DeploymentHandle | None = None,
    ) -> None:
        join_serve()
        path = resolve_model(config.model)
        bundle = _load_bundle(config, describe_model(path, config.name))
        update = None if bundle is None else (bundle.spec, bundle.bases)
        engine = build_engine(path, config.engine, update)
        self._worker = LMWorker(
            engine,
            RemoteGenerator(generator),
            None if bundle is None else bundle.spec,
            None if bundle is None else bundle.hypernetwork_id,
            patience_s=config.generator.patience_s,
        )
        self._reporter = EngineReporter()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(report_every(INTERVAL_S, self._report)),
            *telling(board, self._tell),
        ]

    async def generate(self, request: TokenizedRequest) -> AsyncIterator[TokenChunk]:
        """See LMWorker.generate."""
        chunks = self._worker.generate(request)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def record_routing_stats(self) -> dict[str, list[str]]:
        """What this replica has at hand, for the request router."""
        return routing_stats(self._worker.resident)

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
        bundle = _load_bundle(config, info)
        tokenizer = load_tokenizer(path)
        embedding = load_embedding(path)
        self._lm = RemoteWorker(lm)
        snapshot = ClusterSnapshot.empty(info.hidden_size) if bundle is None else bundle.snapshot
        prompts = PromptEncoder(
            tokenizer,
            self._context_length(info),
            info.vocab_size,
            _embedded_tokens(bundle, info.context_length),
        )
        describe = CharacteristicTokens(embedding, prompts.token_text)
        refining = RouterRefining(
            config.refinement,
            None if bundle is None else refinement_store(config, bundle),
            refinery,
            config.learner.poll_interval_s,
        )

        def assigner(namespace: str) -> Assigner:
            return Assigner(
                snapshot=snapshot,
                index_factory=lambda rows: FaissIndex(rows, config.router.index_device),
                base=info.fingerprint,
                hypernetwork=None if bundle is None else bundle.hypernetwork_id,
                describe=describe,
                described_from=config.router.described_from,
                refined=partial(refining.refined, namespace),
            )

        learning = RouterLearning(config.learner, bundle, learner, assigner)
        self._learning, self._refining = learning, refining
        self._reporter = TrafficReporter(config.metrics.max_clusters)
        worker = Delivery(self._lm, config.router.attempts, timeout_s=config.router.timeout_s)
        increments = Increments()
        listeners = [self._reporter.ended, log_stream, trace_stream, increments.listen]
        self._traffic = Traffic(listeners=listeners)
        self._probe = GainProbe(worker, self._traffic.gained, config.metrics.gain_share)
        listeners.append(self._probe.ended)
        self._log = _request_log(config.request_log, prompts.text)
        self._router = ClusterRouter(
            model=ServedModel(
                name=config.name,
                created=int(time.time()),
                context_length=self._context_length(info),
                vocab_size=info.vocab_size,
            ),
            prompts=prompts,
            embedder=TokenEmbedder(embedding, None if bundle is None else bundle.token_weights),
            assigners=learning.assigners,
            worker=worker if self._log is None else LoggedWorker(worker, self._log),
            exporter=RemoteGenerator(generator),
            observers=(learning.observe, refining.observe),
            traffic=self._traffic,
        )
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(report_every(INTERVAL_S, self._report)),
            loop.create_task(self._probe.run()),
        ]
        if self._log is not None:
            self._tasks.append(loop.create_task(self._log.run(config.request_log.interval_s)))
        self._board: RemoteBoard | None = None
        if board is not None:
            self._board = RemoteBoard(board)
            plane = ClusterMap(snapshot.centroids, snapshot.mean)
            reporter = RouterReporter(
                here(), self._board, self._traffic, increments, learning.assigners, plane
            )
            self._tasks.append(loop.create_task(report_every(PERIOD_S, reporter.report)))

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
        chunks = self._router.run(self._router.prepare(request))
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def assign(self, request: GenerateRequest) -> Assignment:
        """See ClusterRouter.assign."""
        return self._router.assign(request)

    async def clusters(self, namespace: str = DEFAULT_NAMESPACE) -> list[ClusterInfo]:
        """See ClusterRouter.clusters."""
        return self._router.clusters(namespace)

    async def _report(self) -> None:
        self._reporter.report(self._traffic)
        self._reporter.handed_on("learner", self._learning.outbox)
        self._reporter.handed_on("refinery", self._refining.outbox)

    async def _readiness(self) -> str | None:
        return None if await self._lm.ready() else "the engine's thread has ended"

    def _context_length(self, info: ModelInfo) -> int:
        return min(self._config.engine.max_context or info.context_length, info.context_length)
