"""The nouns that travel between packages and processes.

Everything here is immutable, picklable, and free of torch and ray.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length", "abort"]
FloatArray = NDArray[np.float32]

DEFAULT_NAMESPACE = ""
"""Namespace of requests that name none."""

Place = tuple[str, int]
"""A namespace and the id of a cluster in it, or COMMON."""

COMMON = -1
"""In place of a cluster: what is common to all of a namespace."""

_LEAST_TEMPERATURE = 1e-6
"""What is far below it is zero in an engine's float32, and no divisor."""


def _greedy_near_zero(temperature: float) -> float:
    return temperature if temperature >= _LEAST_TEMPERATURE else 0.0


def _printable(namespace: str) -> str:
    if len(namespace) > 128 or not namespace.isprintable():
        raise ValueError("namespace must be at most 128 printable characters.")
    return namespace


Timeout = Annotated[float, Field(ge=0.001, le=86400)]
"""Seconds in which an answer must be complete. Less than a thousandth is a mistake, not a wish."""

Namespace = Annotated[str, AfterValidator(_printable), Field(json_schema_extra={"maxLength": 128})]
"""Name of a tenant, whose clusters are kept apart from those of others."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SamplingParams(_Frozen):
    """How tokens are chosen. Names and meanings are OpenAI's, with vLLM's extensions.

    `temperature=0` is greedy, and less than a millionth is taken for 0. `top_k=0` and `min_p=0` are
    off. `logprobs=k` returns the chosen token's log-probability and the k most likely;
    `prompt_logprobs=k` does so for the prompt. `seed` makes the sampled tokens a function of the
    request alone, under any batching.
    """

    max_tokens: Annotated[int, Field(ge=0)] = 16
    min_tokens: Annotated[int, Field(ge=0)] = 0
    temperature: Annotated[float, Field(ge=0, le=2), AfterValidator(_greedy_near_zero)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = {}
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Message(_Frozen):
    """One chat turn. `content` is plain text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str
    name: str | None = None


class GenerateRequest(_Frozen):
    """What a caller asks: exactly one of `prompt` (text), `prompt_tokens` or `messages`.

    `adaptation` is `"auto"` (assign a cluster), `"off"` (the unadapted base model) or a cluster id.
    `namespace` names the tenant whose clusters are used. With `learn` the prompt's embedding, and
    nothing else of it, enters the statistics of that tenant's clusters. An answer that is not
    complete within `timeout_s` seconds ends with DeadlineError.
    """

    prompt: str | None = None
    prompt_tokens: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    messages: tuple[Message, ...] | None = None
    sampling: SamplingParams = SamplingParams()
    adaptation: Literal["auto", "off"] | Annotated[int, Field(ge=0)] = "auto"
    namespace: Namespace = DEFAULT_NAMESPACE
    learn: bool = True
    timeout_s: Timeout | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """Content id of one update: equal keys mean equal weights.

    `cluster` is None for the static update (the learned part that every cluster shares).
    `version` is the snapshot version at which this cluster last moved, so a snapshot that leaves a
    cluster in place leaves its key in place. `refinement` is the content id of an update refined
    on the cluster's prompts; it no longer depends on where the cluster is, and has version 0. One
    that begins with `instead-` stands in for such an update while that is gone.
    """

    base: str
    hypernetwork: str
    cluster: int | None
    version: int
    refinement: str = ""

    @property
    def id(self) -> str:
        """Sixteen hex digits that name this update everywhere it is cached or shown."""
        text = f"{self.base}/{self.hypernetwork}/{self.cluster}/{self.version}"
        if self.refinement:
            text += f"/refined-{self.refinement}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """What the hypernetwork sees of a cluster.

    Attributes:
        vector: float32 [c], the cluster's statistics.
        support: how many prompts stand behind it; thin support shrinks the update.
    """

    vector: FloatArray
    support: float


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Which update a request runs under, and why.

    `key` is None when adaptation is off. `cluster` is None when the prompt resembles no cluster:
    the request then runs under the static update, and `conditioning` is None too.
    `similarity` is the cosine to the nearest centroid, None when nothing was compared.
    """

    key: AdapterKey | None
    cluster: int | None = None
    similarity: float | None = None
    snapshot_version: int = 0
    conditioning: Conditioning | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What a request leaves behind for those who learn from the traffic, if it may be learned from.

    Attributes:
        namespace: the tenant whose clusters may learn from it.
        embedding: float32 [d], of the prompt.
        prompt_tokens: the prompt, as the model reads it.
        assignment: what it runs under.
        answered: an answer is part of the prompt, sampled perhaps from the update that would learn.
    """

    namespace: str
    embedding: FloatArray
    prompt_tokens: tuple[int, ...]
    assignment: Assignment
    answered: bool = False


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """What a router sends to an LM replica: token ids and the assignment they run under.

    `timeout_s` is for the router itself: the seconds in which the answer must be complete.
    `namespace` and `learn` are the request's own. One that is `background` is refused where traffic
    could feel it. With `whole` nobody sees any of the answer before it is complete. The prompt of
    one that is `answered` holds an earlier answer.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    sampling: SamplingParams
    assignment: Assignment
    timeout_s: float | None = None
    namespace: str = DEFAULT_NAMESPACE
    learn: bool = True
    background: bool = False
    whole: bool = False
    answered: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability (nats), and the most likely alternatives at its place.

    `text` is the token decoded alone; `raw` its exact bytes. `logprob` is None for the first token
    of a prompt, which nothing predicts. `top` holds entries whose own `top` is empty.
    """

    token: int
    text: str
    raw: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """One piece of a streamed answer.

    A stream is: chunks with new text, of which the last has `finish_reason` set. `tokens` and
    `logprobs` belong to `text`, but text that could still become a stop string is held back, so
    tokens may arrive ahead of their text. `prompt_logprobs` and `cached_tokens` (prompt tokens that
    a prefix cache held) come once, on the first chunk; so does `stand_in`, the key of the update
    that an answer ran under in place of its own, which could not be had in time. `received_s` is
    when a router received it, on that process's monotonic clock, where it was held back.
    """

    request_id: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    stand_in: AdapterKey | None = None
    received_s: float | None = None

    @classmethod
    def joined(cls, chunks: Sequence[TokenChunk]) -> TokenChunk:
        """Neighbouring chunks of a stream as one, which came when the first of them did."""
        if len(chunks) == 1:
            return chunks[0]
        first, last = chunks[0], chunks[-1]
        return replace(
            first,
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(token for chunk in chunks for token in chunk.tokens),
            logprobs=tuple(entry for chunk in chunks for entry in chunk.logprobs),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
        )


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What adapted an answer: the part of an Assignment that callers see.

    With `fallback` the cluster's own update could not be had in time, and another stood in: the
    static one, or for a refined update that is gone the one it was refined from.
    """

    mode: Literal["cluster", "static", "off"]
    cluster: int | None = None
    similarity: float | None = None
    adapter_key: str | None = None
    snapshot_version: int = 0
    fallback: bool = False

    @classmethod
    def of(cls, assignment: Assignment, stand_in: AdapterKey | None = None) -> Adaptation:
        """Describe `assignment` to a caller, or what stood in for its update."""
        key = stand_in or assignment.key
        mode: Literal["cluster", "static", "off"] = (
            "off" if key is None else "static" if key.cluster is None else "cluster"
        )
        return cls(
            mode=mode,
            cluster=assignment.cluster,
            similarity=None if assignment.similarity is None else round(assignment.similarity, 6),
            adapter_key=None if key is None else key.id,
            snapshot_version=assignment.snapshot_version,
            fallback=stand_in is not None,
        )


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished answer, whole."""

    request_id: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    adaptation: Adaptation
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """A cluster as shown to callers.

    `refinement` counts how often its update has been refined on its prompts.
    `characteristic_tokens` are the vocabulary entries that set the cluster apart from the mean of
    all traffic; they are derived from the centroid alone.
    """

    id: int
    size: int
    version: int
    adapter_key: str
    refinement: int = 0
    characteristic_tokens: tuple[str, ...] = field(default=())
