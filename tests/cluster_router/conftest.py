"""A word tokenizer, a random embedding and a scripted worker: small, but real parts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cluster_router.clusters import Assigner
from cluster_router.embedding import TokenEmbedder
from cluster_router.index import FaissIndex
from cluster_router.prompts import PromptEncoder
from cluster_router.router import ClusterRouter, ServedModel
from cluster_router.tenants import TenantAssigners
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import (
    AdapterKey,
    Conditioning,
    Observation,
    TokenChunk,
    TokenizedRequest,
)

WORDS = ["sail", "mast", "wind", "court", "judge", "law", "user", "system", "assistant", "tool"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %}<s> {{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)


class ScriptedWorker:
    """Streams one chunk a token: as many words "w0 ", "w1 ", ... as asked for.

    Attributes:
        requests: what it was asked. closed: how many of its streams have ended, in any way.
        fails_after: chunks after which it raises `failure`; None never does.
        cut_after: chunks after which it ends without a finish reason; None never does.
        stall: an event it waits for before its first chunk; None does not wait.
    """

    def __init__(self) -> None:
        self.requests: list[TokenizedRequest] = []
        self.closed = 0
        self.fails_after: int | None = None
        self.failure: Exception = RuntimeError("unset")
        self.cut_after: int | None = None
        self.stall: asyncio.Event | None = None

    async def generate(self, request: TokenizedRequest) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        count = request.sampling.max_tokens
        try:
            if self.stall is not None:
                await self.stall.wait()
            for place in range(count):
                if place == self.fails_after:
                    raise self.failure
                if place == self.cut_after:
                    return
                await asyncio.sleep(0)
                yield TokenChunk(
                    request.request_id,
                    text=f"w{place} ",
                    tokens=(place,),
                    finish_reason="length" if place == count - 1 else None,
                )
        finally:
            self.closed += 1


class RecordingExporter:
    def __init__(self) -> None:
        self.exported: list[tuple[AdapterKey, Conditioning | None, str]] = []

    async def export(self, key: AdapterKey, conditioning: Conditioning | None, form: str) -> bytes:
        self.exported.append((key, conditioning, form))
        return b"PK" + key.id.encode()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `<s>` in front of plain prompts, a chat template that refuses tools."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    backend.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="session")
def embedding(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(tokenizer), 32)).astype(np.float32)


@pytest.fixture
def make_snapshot() -> Callable[..., ClusterSnapshot]:
    """Snapshot over given centroids; ids are 10, 20, ..., versions 1, 2, ..."""

    def make(
        centroids: np.ndarray, *, version: int = 7, threshold: float = 0.5, first_id: int = 10
    ) -> ClusterSnapshot:
        centroids = np.asarray(centroids, np.float32)
        centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
        count, dim = centroids.shape
        return ClusterSnapshot(
            version=version,
            ids=np.arange(count) * 10 + first_id,
            centroids=centroids,
            sizes=np.arange(count) * 100 + 5,
            versions=np.arange(count) + 1,
            conditioning=np.arange(count * 3, dtype=np.float32).reshape(count, 3),
            mean=np.zeros(dim, np.float32),
            threshold=threshold,
        )

    return make


@pytest.fixture
def prompts(tokenizer: PreTrainedTokenizerFast) -> PromptEncoder:
    return PromptEncoder(tokenizer, context_length=32, vocab_size=len(tokenizer))


@pytest.fixture
def embedder(embedding: np.ndarray) -> TokenEmbedder:
    return TokenEmbedder(embedding)


@pytest.fixture
def ship_and_court(
    make_snapshot: Callable[..., ClusterSnapshot],
    embedder: TokenEmbedder,
    tokenizer: PreTrainedTokenizerFast,
) -> ClusterSnapshot:
    """Cluster 10 is about ships, cluster 20 about courts."""
    topics = ["sail mast wind", "court judge law"]
    return make_snapshot(
        [embedder.embed(tokenizer.encode(topic, add_special_tokens=False)) for topic in topics]
    )


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


@pytest.fixture
def exporter() -> RecordingExporter:
    return RecordingExporter()


@pytest.fixture
def assigners(ship_and_court: ClusterSnapshot) -> TenantAssigners:
    return TenantAssigners(lambda _: Assigner(ship_and_court, FaissIndex, "base", "hyper"))


@pytest.fixture
def observed() -> list[Observation]:
    """What the router shows of prompts that may be learned from."""
    return []


@pytest.fixture
def router(
    tokenizer: PreTrainedTokenizerFast,
    prompts: PromptEncoder,
    embedder: TokenEmbedder,
    assigners: TenantAssigners,
    worker: Any,
    exporter: Any,
    observed: list[Observation],
) -> ClusterRouter:
    model = ServedModel("tiny", created=1, context_length=32, vocab_size=len(tokenizer))
    observers = [observed.append]
    return ClusterRouter(model, prompts, embedder, assigners, worker, exporter, observers)
