"""ClusterRouter: the front door. Tokenise, embed, assign, and send one call to an LM worker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from cluster_router.embedding import TokenEmbedder
from cluster_router.prompts import EncodedPrompt, PromptEncoder
from cluster_router.tenants import TenantAssigners
from cluster_router.tracing import preparing
from cluster_router.traffic import Traffic
from cluster_router.wire.errors import EngineError
from cluster_router.wire.forms import ExportForm
from cluster_router.wire.snapshot import ClusterSnapshot
from cluster_router.wire.types import (
    DEFAULT_NAMESPACE,
    Adaptation,
    AdapterKey,
    Assignment,
    ClusterInfo,
    Conditioning,
    FloatArray,
    GenerateRequest,
    GenerateResult,
    Observation,
    TokenChunk,
    TokenizedRequest,
    TokenLogprob,
)

_LONG_PROMPT = 2**14
"""Characters or tokens of a prompt whose preparation would hold up the event loop."""


class Worker(Protocol):
    """An LM replica, or many behind a handle."""

    def generate(self, request: TokenizedRequest) -> AsyncIterator[TokenChunk]:
        """Stream the answer to `request`. If it is an async generator, `aclose` cancels it."""
        ...


class Exporter(Protocol):
    """Writes updates in PEFT's format."""

    async def export(
        self, key: AdapterKey, conditioning: Conditioning | None, form: ExportForm
    ) -> bytes:
        """The update `key` as a zip archive of a PEFT adapter directory."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What this service serves. `created` is in Unix seconds."""

    name: str
    created: int
    context_length: int
    vocab_size: int


class ClusterRouter:
    """Serves requests. It holds no state of its own but what it is given.

    Args:
        model: what is served.
        prompts: tokenises.
        embedder: embeds.
        assigners: choose clusters, by namespace.
        worker: answers.
        exporter: writes updates for download.
        observers: shown each prompt that may be learned from. They must return at once and never
            fail.
        traffic: counts; None counts for this router alone.
    """

    def __init__(
        self,
        model: ServedModel,
        prompts: PromptEncoder,
        embedder: TokenEmbedder,
        assigners: TenantAssigners,
        worker: Worker,
        exporter: Exporter,
        observers: Sequence[Callable[[Observation], None]] = (),
        traffic: Traffic | None = None,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._embedder = embedder
        self._assigners = assigners
        self._worker = worker
        self._exporter = exporter
        self._observers = observers
        self._traffic = traffic or Traffic()
        # One thread: however many long prompts come together, they take no more than one core.
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="long-prompts")

    @property
    def traffic(self) -> Traffic:
        """What this router has served."""
        return self._traffic

    @property
    def model(self) -> ServedModel:
        """What is served."""
        return self._model

    async def prepare(self, request: GenerateRequest) -> TokenizedRequest:
        """Validate, tokenise, embed and assign; the assignment holds whatever is learned later.

        Raises:
            RequestError: see `PromptEncoder.encode` and `Assigner.assign`.
        """
        try:
            with preparing():
                return await self._prepare(request)
        except Exception as error:
            self._traffic.refused(request.namespace, error)
            raise

    async def _prepare(self, request: GenerateRequest) -> TokenizedRequest:
        if _length(request) < _LONG_PROMPT:
            encoded, embedding = self._encode(request)
        else:
            loop = asyncio.get_running_loop()
            encoded, embedding = await loop.run_in_executor(self._aside, self._encode, request)
        assigner = await self._assigners.ready(request.namespace)
        assignment = assigner.assign(embedding, request.adaptation)
        if request.learn:
            seen = Observation(
                request.namespace, embedding, encoded.prompt_tokens, assignment, encoded.answered
            )
            for observe in self._observers:
                observe(seen)
        return TokenizedRequest(
            request_id=request.request_id or uuid.uuid4().hex,
            prompt_tokens=encoded.prompt_tokens,
            sampling=request.sampling,
            assignment=assignment,
            timeout_s=request.timeout_s,
            namespace=request.namespace,
            learn=request.learn,
            answered=encoded.answered,
        )

    def _encode(self, request: GenerateRequest) -> tuple[EncodedPrompt, FloatArray]:
        encoded = self._prompts.encode(request)
        return encoded, self._embedder.embed(encoded.content_tokens)

    def remaining(self, prompt_tokens: Sequence[int]) -> int:
        """How many tokens the context has left after `prompt_tokens`; never below 0."""
        return self._prompts.remaining(prompt_tokens)

    async def run(self, request: TokenizedRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream the answer to a prepared request.

        Closing this generator, or cancelling the task that reads it, closes the worker's stream.
        """
        flight = self._traffic.begin(request)
        chunks = self._worker.generate(request)
        error: BaseException | None = None
        try:
            async for chunk in chunks:
                flight.chunk(chunk)
                yield chunk
        except BaseException as raised:
            error = raised
            raise
        finally:
            flight.end(error)
            if isinstance(chunks, AsyncGenerator):
                await chunks.aclose()

    async def stream(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream the answer to `request`; see `run`.

        Raises:
            RequestError: with the first chunk; see `prepare`.
        """
        async with aclosing(self.run(await self.prepare(request))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Answer `request` whole.

        Raises:
            RequestError: see `prepare`.
            EngineError: the worker's stream ended before the answer did.
        """
        prepared = replace(await self.prepare(request), whole=True)
        return collect(prepared, [chunk async for chunk in self.run(prepared)])

    async def assign(self, request: GenerateRequest) -> Assignment:
        """What `request` would run under. Nothing is generated, and nothing learned.

        Raises:
            RequestError: see `prepare`.
        """
        prepared = await self._prepare(request.model_copy(update={"learn": False}))
        return prepared.assignment

    async def clusters(self, namespace: str = DEFAULT_NAMESPACE) -> list[ClusterInfo]:
        """Every cluster that `namespace` uses now."""
        return (await self.table(namespace))[1]

    async def table(
        self, namespace: str = DEFAULT_NAMESPACE
    ) -> tuple[ClusterSnapshot, list[ClusterInfo]]:
        """The snapshot that `namespace` uses now, and every cluster of it."""
        return await asyncio.to_thread((await self._assigners.ready(namespace)).table)

    async def cluster(self, id: int, namespace: str = DEFAULT_NAMESPACE) -> ClusterInfo:
        """One cluster of `namespace`.

        Raises:
            UnknownClusterError: no cluster has this id.
        """
        return await asyncio.to_thread((await self._assigners.ready(namespace)).cluster, id)

    async def export(
        self, id: int, namespace: str = DEFAULT_NAMESPACE, form: ExportForm = "whole"
    ) -> bytes:
        """A cluster's update as a zip archive of a PEFT adapter.

        Raises:
            UnknownClusterError: no cluster has this id.
            RequestError: `form` leaves nothing of it.
        """
        key, conditioning = (await self._assigners.ready(namespace)).conditioning(id)
        return await self._exporter.export(key, conditioning, form)

    def text(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, special ones included."""
        return self._prompts.text(tokens, special=True)


def _length(request: GenerateRequest) -> int:
    """Of its prompt, in whatever it is given in."""
    written = sum(len(message.content) for message in request.messages or ())
    return written + len(request.prompt or "") + len(request.prompt_tokens or ())


def collect(request: TokenizedRequest, chunks: Sequence[TokenChunk]) -> GenerateResult:
    """The whole answer that `chunks` streamed.

    Raises:
        EngineError: no chunk says why the answer finished.
    """
    last = chunks[-1] if chunks else None
    if last is None or last.finish_reason is None:
        raise EngineError(f"the answer to request {request.request_id} was cut off; send it again")
    logprobs: list[TokenLogprob] = [entry for chunk in chunks for entry in chunk.logprobs]
    return GenerateResult(
        request_id=request.request_id,
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        finish_reason=last.finish_reason,
        adaptation=Adaptation.of(request.assignment, chunks[0].stand_in),
        prompt_tokens=len(request.prompt_tokens),
        logprobs=tuple(logprobs),
        prompt_logprobs=chunks[0].prompt_logprobs,
        stop_reason=last.stop_reason,
        cached_tokens=chunks[0].cached_tokens,
    )
