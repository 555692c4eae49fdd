"""Settings of the application: the `args` of `deploy/config.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from adapter_gen.refinery import RefineryConfig
from cluster_router.access import Access, KeyFile
from cluster_router.affinity import AffinityPolicy
from cluster_router.http import MAX_BODY_BYTES
from cluster_router.index import Device
from cluster_router.learning.config import LearnerConfig
from cluster_router.request_log import PART_BYTES
from cluster_router.wire.errors import ConfigError
from cluster_router.wire.types import Namespace, Timeout
from lm_workers.config import EngineConfig
from lm_workers.models import DEFAULT_MODEL
from lm_workers.vllm.config import VllmConfig

SHIPPED = Path(__file__).parent / "bundles"
"""Bundles that come with the project, by name."""

EVERY_NAMESPACE = "*"
"""In `refinement.namespaces`: the prompts of every tenant may be learned from."""


class AccessConfig(BaseModel):
    """Who may call over HTTP. Calls through Python handles come from the cluster and need no key.

    Attributes:
        keys: file of API keys, as `chameleon keys add` writes it; None lets everyone in. Each
            router reads its own node's, and again when it changes.
        rates: where requests of a key are counted. `memory://` counts for each router alone, a
            `redis://` URL for all (needs the `redis` package); while that does not answer, each
            router counts for itself.
        max_body_bytes: longest body.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: Path | None = None
    rates: Annotated[str, Field(min_length=1)] = "memory://"
    max_body_bytes: Annotated[int, Field(gt=0)] = MAX_BODY_BYTES

    def build(self) -> Access | None:
        """What lets callers in; None where everyone may.

        Raises:
            ConfigError: the keys cannot be read, or nothing installed counts at `rates`.
        """
        if self.keys is None:
            return None
        return Access(KeyFile(self.keys.expanduser()).keys, self.rates)


class RouterConfig(BaseModel):
    """The front door.

    Attributes:
        index_device: where FAISS searches the centroids.
        chat_max_tokens: longest chat answer when the request sets none; None is all that is left
            of the context.
        timeout_s: seconds that an answer may take, and the most that a request may ask for
            (`timeout_s`); None is no limit.
        attempts: how often an answer that has not begun is sent for when LM replicas are lost.
        described_from: prompts that a cluster must stand for before its characteristic words are
            shown; those of a smaller one would say what few people wrote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    index_device: Device = "auto"
    timeout_s: Timeout | None = None
    attempts: Annotated[int, Field(gt=0, le=10)] = 3
    described_from: Annotated[int, Field(ge=0)] = 20
    chat_max_tokens: Annotated[int, Field(gt=0)] | None = None


class StreamingConfig(BaseModel):
    """How LM replicas send tokens on.

    Attributes:
        chunks_per_s: chunks that a replica sends in a second, about, all its streams together.
            Where more tokens come, those of a stream share a chunk, though never its first, and
            none waits longer than about a tenth of a second; what waits is sent for all streams at
            once. Each chunk is work for the replica, the router and the proxy. None is 160 on a
            CPU, which they share with the engine, and 1000 on a GPU, where it was not measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    chunks_per_s: Annotated[float, Field(gt=0, le=1e6)] | None = None


class GeneratorConfig(BaseModel):
    """The adapter generator.

    Attributes:
        cache_bytes: bytes of generated updates kept.
        device: where the hypernetwork runs.
        patience_s: how long a request waits for its update before it runs under the static one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_bytes: Annotated[int, Field(gt=0)] = 2**28
    device: str = "cpu"
    patience_s: Annotated[float, Field(gt=0, le=600)] = 5.0


class LearningConfig(BaseModel):
    """How clusters follow the traffic. Without a bundle nothing is learned.

    Attributes:
        enabled: whether anything is learned; if not, the bundle's clusters are served as they are.
        uri: folder or URI (`s3://bucket/clusters`) in which clusters are kept, each bundle's in a
            folder of its own; None is this user's cache. Routers and learner must all reach it, so
            services on several machines have to name one.
        publish_interval_s: how often what was learned is saved for the routers; a crash loses no
            more than this.
        poll_interval_s: how often routers look for what was published.
        batch_size: prompts that a router sends to the learner without further delay.
        batch_interval_s: longest that a prompt's embedding waits for others.
        buffer_size: most embeddings that wait in a router; beyond it the oldest are dropped.
        max_namespaces: how many may learn beside the default one, and how many a router keeps.
        clusters: settings of the clustering itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True
    uri: Annotated[str, Field(min_length=1)] | None = None
    publish_interval_s: Annotated[float, Field(gt=0, le=3600)] = 5.0
    poll_interval_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    batch_size: Annotated[int, Field(gt=0)] = 64
    batch_interval_s: Annotated[float, Field(gt=0, le=60)] = 0.2
    buffer_size: Annotated[int, Field(gt=0)] = 4096
    max_namespaces: Annotated[int, Field(gt=0)] = 64
    clusters: LearnerConfig = LearnerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> LearningConfig:
        if self.buffer_size < self.batch_size:
            raise ValueError("buffer_size must hold a batch; raise it or lower batch_size")
        return self


class RefinementConfig(BaseModel):
    """Whose prompts clusters are refined on: a few gradient steps now and then, in the background.

    Off unless a namespace is named. The latest prompts of its clusters are then kept in memory, and
    nowhere else; what is kept of them are the numbers of an update, beside the clusters in
    `learner.uri`.

    Attributes:
        namespaces: tenants whose prompts may be learned from; `""` is that of requests that name
            none, `"*"` every one.
        device: where the refinery computes. On a CPU it takes what the engine leaves it.
        refinery: what is kept, and when and how it is learned from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespaces: tuple[Namespace, ...] = ()
    device: str = "auto"
    refinery: RefineryConfig = RefineryConfig()

    @property
    def enabled(self) -> bool:
        """Whether anything is refined."""
        return bool(self.namespaces)

    def allows(self, namespace: str) -> bool:
        """Whether prompts of `namespace` may be learned from."""
        return namespace in self.namespaces or EVERY_NAMESPACE in self.namespaces


class MetricsConfig(BaseModel):
    """What is measured of live traffic.

    Attributes:
        max_clusters: pairs of namespace and cluster that have labels of their own in Prometheus,
            in each router; all others share one.
        gain_share: share of the adapted answers whose prompts are scored once more, under their
            cluster's update and under the static one, while the engine has room: an estimate of
            what the updates are worth on live traffic. 0 makes none; requests with `learn: false`
            are never taken.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_clusters: Annotated[int, Field(ge=0)] = 256
    gain_share: Annotated[float, Field(ge=0, le=1)] = 0.01


class RequestLogConfig(BaseModel):
    """Prompts and answers as text to train a bundle on. Off unless a namespace is named.

    Requests with `learn: false` are never logged.

    Attributes:
        namespaces: tenants whose requests are logged; `""` is that of requests that name none,
            `"*"` every one.
        uri: folder or URI (`s3://bucket/requests`) for the log: a folder of gzipped JSON lines for
            each namespace, as `chameleon data --data` reads it.
        max_bytes: text of one namespace that is kept by size, before compression; the oldest makes
            room.
        interval_s: how often the log is written; a crash loses no more than this.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespaces: tuple[Namespace, ...] = ()
    uri: Annotated[str, Field(min_length=1)] | None = None
    max_bytes: Annotated[int, Field(ge=PART_BYTES)] = 2**30
    interval_s: Annotated[float, Field(gt=0, le=3600)] = 10.0

    @model_validator(mode="after")
    def _somewhere(self) -> RequestLogConfig:
        if self.namespaces and self.uri is None:
            raise ValueError("set uri, the folder in which requests are to be logged")
        return self

    def allows(self, namespace: str) -> bool:
        """Whether requests of `namespace` are logged."""
        return namespace in self.namespaces or EVERY_NAMESPACE in self.namespaces


class ConsoleConfig(BaseModel):
    """The web page at `/`.

    Attributes:
        enabled: whether there is one, and a board that replicas report to each second.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enabled: bool = True


def _backend(settings: Any) -> str:
    if isinstance(settings, Mapping):
        return str(settings.get("backend", "built-in"))
    return str(getattr(settings, "backend", ""))


EngineSettings = Annotated[
    Annotated[EngineConfig, Tag("built-in")] | Annotated[VllmConfig, Tag("vllm")],
    Discriminator(
        _backend,
        custom_error_type="unknown_backend",
        custom_error_message="backend must be built-in or vllm",
    ),
]
"""The built-in engine's settings, or with `backend: vllm` those of vLLM."""


class AppConfig(BaseModel):
    """What is served, and how.

    How many replicas of each part, and on what resources, is Serve's own `deployments:` section.

    Attributes:
        model: the embedded default's name, a Hugging Face id, a local folder or a GGUF file.
        served_name: name clients use in `model`; None is `model` itself.
        bundle: name of a shipped bundle or path of one; None serves the base model unadapted.
        routing: how requests are spread over the replicas that serve them.
        access: who may call.
        engine: how each LM replica runs.
        router: the front door.
        streaming: how LM replicas send tokens on.
        generator: what makes updates.
        learner: how clusters follow the traffic.
        refinement: whose prompts clusters are refined on.
        metrics: what is measured of live traffic.
        request_log: whose requests are kept as text to train on.
        console: the web page at `/`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1)] = DEFAULT_MODEL
    served_name: Annotated[str, Field(min_length=1)] | None = None
    bundle: str | None = DEFAULT_MODEL
    engine: EngineSettings = EngineConfig()
    routing: AffinityPolicy = AffinityPolicy()
    router: RouterConfig = RouterConfig()
    streaming: StreamingConfig = StreamingConfig()
    access: AccessConfig = AccessConfig()
    generator: GeneratorConfig = GeneratorConfig()
    learner: LearningConfig = LearningConfig()
    refinement: RefinementConfig = RefinementConfig()
    metrics: MetricsConfig = MetricsConfig()
    request_log: RequestLogConfig = RequestLogConfig()
    console: ConsoleConfig = ConsoleConfig()

    @property
    def name(self) -> str:
        """Name under which the model is served."""
        return self.served_name or self.model

    @property
    def bundle_path(self) -> Path | None:
        """Directory of the bundle.

        Raises:
            ConfigError: there is none of that name or path.
        """
        if self.bundle is None:
            return None
        for path in (SHIPPED / self.bundle, Path(self.bundle).expanduser()):
            if path.is_dir():
                return path.resolve()
        shipped = sorted(path.name for path in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
        raise ConfigError(
            f"bundle {self.bundle!r} is neither a directory nor a shipped bundle ({shipped}); "
            "correct it, or set it to null to serve the base model unadapted",
            "bundle",
        )
