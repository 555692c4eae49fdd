"""A real router over a byte tokenizer and two clusters; only the LM worker is scripted."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster_router.clusters import Assigner
from cluster_router.embedding import TokenEmbedder
from cluster_router.http import build_app
from cluster_router.index import FaissIndex
from cluster_router.prompts import PromptEncoder
from cluster_router.router import ClusterRouter, ServedModel
from cluster_router.tenants import TenantAssigners
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import AdapterKey, TokenChunk, TokenizedRequest, TokenLogprob

MODEL = "tiny/bytes"
CONTEXT = 256
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and no more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE)


class ScriptedWorker:
    """Answers with the letters a, b, c, ... one a chunk; a seed or sample moves the first letter.

    Attributes:
        requests: what it was asked, in order.
        observed: namespaces of the prompts that the learner was let know of.
        open: how many of its streams have not been closed.
        refusal: raised before the first chunk. failure: raised after `fails_after` chunks.
        stalls_after: chunks after which it never goes on.
        cached_tokens: what it says of every prompt.
        stand_in: key of the update that it used instead of the right one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.requests: list[TokenizedRequest] = []
        self.observed: list[str] = []
        self.open = 0
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.fails_after = 1
        self.stalls_after: int | None = None
        self.last_reason = "length"
        self.cached_tokens = 0
        self.stand_in: AdapterKey | None = None

    def letter(self, offset: int) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(chr(ord("a") + offset % 26)))

    def entry(self, token: int, logprob: float | None, top: int) -> TokenLogprob:
        text = self.tokenizer.decode([token])
        piece = self.tokenizer.convert_ids_to_tokens(token)
        raw = text.encode() if "\ufffd" not in text else _bytes(piece)
        others = tuple(
            TokenLogprob(other, self.tokenizer.decode([other]), b"?", -0.5 - rank)
            for rank, other in enumerate([token, *range(40)][:top])
        )
        return TokenLogprob(token, text, raw, logprob, others if logprob is not None else ())

    async def generate(self, request: TokenizedRequest) -> AsyncIterator[TokenChunk]:
        self.requests.append(request)
        self.open += 1
        try:
            async for chunk in self._chunks(request):
                await asyncio.sleep(0)
                yield chunk
        finally:
            self.open -= 1

    async def _chunks(self, request: TokenizedRequest) -> AsyncIterator[TokenChunk]:
        if self.refusal is not None:
            raise self.refusal
        sampling = request.sampling
        prompt = None
        if (top := sampling.prompt_logprobs) is not None:
            prompt = tuple(
                self.entry(token, -0.5 if place else None, top)
                for place, token in enumerate(request.prompt_tokens)
            )
        if sampling.max_tokens == 0:
            yield TokenChunk(
                request.request_id, prompt_logprobs=prompt, finish_reason=self.last_reason
            )
        for place in range(sampling.max_tokens):
            if place == self.stalls_after:
                await asyncio.Event().wait()
            if self.failure is not None and place == self.fails_after:
                raise self.failure
            token = self.letter((sampling.seed or 0) + place)
            last = place == sampling.max_tokens - 1
            yield TokenChunk(
                request.request_id,
                text=self.tokenizer.decode([token]),
                tokens=(token,),
                logprobs=()
                if sampling.logprobs is None
                else (self.entry(token, -0.5, sampling.logprobs),),
                prompt_logprobs=prompt if place == 0 else None,
                finish_reason=self.last_reason if last else None,
                cached_tokens=0 if place else self.cached_tokens,
                stand_in=None if place else self.stand_in,
            )


def _bytes(piece: str) -> bytes:
    table = {character: byte for byte, character in _byte_characters()}
    return bytes(table[character] for character in piece)


def _byte_characters() -> list[tuple[int, str]]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [(b, chr(b)) for b in printable] + [(b, chr(256 + i)) for i, b in enumerate(others)]


class ZipExporter:
    async def export(self, key: Any, conditioning: Any, form: str) -> bytes:
        return b"PK" + key.id.encode() + form.encode()


def build_router(worker: ScriptedWorker) -> ClusterRouter:
    """Cluster 3 likes the letter x, cluster 8 the letter y."""
    tokenizer = worker.tokenizer
    embedding = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
    embedder = TokenEmbedder(embedding)
    centroids = np.stack(
        [embedder.embed([tokenizer.convert_tokens_to_ids(letter)]) for letter in "xy"]
    )
    snapshot = ClusterSnapshot(
        version=5,
        ids=np.array([3, 8]),
        centroids=centroids,
        sizes=np.array([100, 7]),
        versions=np.array([2, 5]),
        conditioning=np.zeros((2, 4), np.float32),
        mean=np.zeros(16, np.float32),
        threshold=0.9,
    )
    return ClusterRouter(
        ServedModel(MODEL, 1_700_000_000, CONTEXT, 256),
        PromptEncoder(tokenizer, CONTEXT, 256),
        embedder,
        TenantAssigners(lambda _: Assigner(snapshot, FaissIndex, "base", "hyper")),
        worker,
        ZipExporter(),
        [lambda seen: worker.observed.append(seen.namespace)],
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def stage() -> SimpleNamespace:
    """What the session's app reaches at this moment: a router, and why it is not ready."""
    return SimpleNamespace(router=None, reason=None)


@pytest.fixture(scope="session")
def built(stage: SimpleNamespace) -> FastAPI:
    async def ready() -> str | None:
        return stage.reason

    return build_app(lambda: stage.router, ready, chat_max_tokens=20)


@pytest.fixture
def worker(tokenizer: PreTrainedTokenizerFast) -> ScriptedWorker:
    return ScriptedWorker(tokenizer)


@pytest.fixture
def app(built: FastAPI, stage: SimpleNamespace, worker: ScriptedWorker) -> FastAPI:
    stage.router, stage.reason = build_router(worker), None
    return built


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@pytest.fixture
def client(http: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="unused", base_url="http://test/v1", http_client=http, max_retries=0)
