"""ClusterRouter: the front door. Tokenise, embed, assign, and send one call to an LM worker."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from cluster_router.embedding import TokenEmbedder
from cluster_router.prompts import PromptEncoder
from cluster_router.tenants import TenantAssigners
from cluster_router.tracing import preparing
from cluster_router.traffic import Traffic
from cluster_router.wire.errors import EngineError
from cluster_router.wire.forms import ExportForm
from cluster_router.wire.types import (
    DEFAULT_NAMESPACE,
    Adaptation,
    AdapterKey,
    Assignment,
    ClusterInfo,
    Conditioning,
    GenerateRequest,
    GenerateResult,
    Observation,
    TokenChunk,
    TokenizedRequest,
    TokenLogprob,
)


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

    @property
    def traffic(self) -> Traffic:
        """What this router has served."""
        return self._traffic

    @property
    def model(self) -> ServedModel:
        """What is served."""
        return self._model

    def snapshot_version(self, namespace: str = DEFAULT_NAMESPACE) -> int:
        """Version of the clusters that `namespace` uses."""
        return self._assigners.of(namespace).snapshot.version

    def prepare(self, request: GenerateRequest) -> TokenizedRequest:
        """Validate, tokenise, embed and assign; the assignment holds whatever is learned later.

        Raises:
            RequestError: see `PromptEncoder.encode` and `Assigner.assign`.
        """
        try:
            with preparing():
                return self._prepare(request)
        except Exception as error:
            self._traffic.refused(request.namespace, error)
            raise

    def _prepare(self, request: GenerateRequest) -> TokenizedRequest:
        encoded = self._prompts.encode(request)
        embedding = self._embedder.embed(encoded.content_tokens)
        assigner = self._assigners.of(request.namespace)
        assignment = assigner.assign(embedding, request.adaptation)
        if request.learn:
            seen = Observation(request.namespace, embedding, encoded.prompt_tokens, assignment)
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
        )

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

    def stream(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream the answer to `request`.

        Raises:
            RequestError: at once, before the first chunk is asked for; see `prepare`.
        """
        return self.run(self.prepare(request))

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Answer `request` whole.

        Raises:
            RequestError: see `prepare`.
            EngineError: the worker's stream ended before the answer did.
        """
        prepared = replace(self.prepare(request), whole=True)
        return collect(prepared, [chunk async for chunk in self.run(prepared)])

    def assign(self, request: GenerateRequest) -> Assignment:
        """What `request` would run under. Nothing is generated, and nothing learned.

        Raises:
            RequestError: see `prepare`.
        """
        return self._prepare(request.model_copy(update={"learn": False})).assignment

    def clusters(self, namespace: str = DEFAULT_NAMESPACE) -> list[ClusterInfo]:
        """Every cluster that `namespace` uses now."""
        return self._assigners.of(namespace).clusters()

    def cluster(self, id: int, namespace: str = DEFAULT_NAMESPACE) -> ClusterInfo:
        """One cluster of `namespace`.

        Raises:
            UnknownClusterError: no cluster has this id.
        """
        return self._assigners.of(namespace).cluster(id)

    async def export(
        self, id: int, namespace: str = DEFAULT_NAMESPACE, form: ExportForm = "whole"
    ) -> bytes:
        """A cluster's update as a zip archive of a PEFT adapter.

        Raises:
            UnknownClusterError: no cluster has this id.
            RequestError: `form` leaves nothing of it.
        """
        key, conditioning = self._assigners.of(namespace).conditioning(id)
        return await self._exporter.export(key, conditioning, form)

    def token_text(self, token: int) -> str:
        """Text of one token, decoded alone.

        Raises:
            RequestError: the id lies outside the vocabulary.
        """
        return self._prompts.token_text(token)


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
