"""From API requests to prepared requests, and the choices that will answer them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from cluster_router.openai.answers import Answer, Choice, Layout
from cluster_router.openai.chat import ChatLayout, ChatMessage, ChatRequest
from cluster_router.openai.common import SamplingFields
from cluster_router.openai.completions import CompletionLayout, CompletionRequest, Prompt
from cluster_router.wire.errors import RequestError, UnknownModelError
from cluster_router.wire.types import (
    DEFAULT_NAMESPACE,
    GenerateRequest,
    Message,
    SamplingParams,
    TokenizedRequest,
)

if TYPE_CHECKING:
    from cluster_router.router import ClusterRouter

MAX_STREAMS = 2048
"""Most answers, over all prompts, that one request may ask for."""

_DEFAULT_TOKENS = 16  # OpenAI's, for completions.
_SEEDS = 2**63


async def prepare_completion(service: ClusterRouter, body: CompletionRequest) -> Answer:
    """Prepare every prompt of `body`.

    Raises:
        RequestError: fields contradict each other, or a prompt cannot be served.
    """
    _check(service, body)
    max_tokens = _completion_tokens(body)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        **_shared(service, body),
    )
    _check_min_tokens(body, max_tokens)
    prepared, layouts = [], []
    for prompt in body.prompt:
        prepared.append(await service.prepare(_generate(prompt, sampling, body)))
        echo = _echo(service, body, prompt)
        layouts.append(partial(CompletionLayout, echo, body.logprobs is not None))
        await asyncio.sleep(0)  # Many prompts must not keep other requests from their turn.
    return _answer(service, "cmpl", CompletionLayout.kinds, prepared, layouts, body)


async def prepare_chat(
    service: ClusterRouter, body: ChatRequest, most_tokens: int | None
) -> Answer:
    """Prepare the conversation in `body`.

    `most_tokens` bounds an answer whose length `body` leaves open.

    Raises:
        RequestError: fields contradict each other, or the conversation cannot be served.
    """
    _check(service, body)
    max_tokens = _chat_tokens(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", "top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    # How much the context leaves is known once the prompt is in tokens; until then ask for one.
    sampling = SamplingParams(max_tokens=max_tokens or 1, logprobs=top, **_shared(service, body))
    prepared = await service.prepare(_generate(as_messages(body.messages), sampling, body))
    if max_tokens is None:
        rest = service.remaining(prepared.prompt_tokens)
        max_tokens = rest if most_tokens is None else min(rest, most_tokens)
        prepared = _with(prepared, max_tokens=max_tokens)
    _check_min_tokens(body, max_tokens)
    layouts = [partial(ChatLayout, top)]
    return _answer(service, "chatcmpl", ChatLayout.kinds, [prepared], layouts, body)


def check_model(service: ClusterRouter, name: str) -> None:
    """Raise UnknownModelError unless `name` is served."""
    served = service.model.name
    if name != served:
        raise UnknownModelError(
            f"The model {name[:100]!r} does not exist here; ask for {served!r}.", "model"
        )


def _check(service: ClusterRouter, body: SamplingFields) -> None:
    check_model(service, body.model)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream: true.", "stream_options")


def _check_min_tokens(body: SamplingFields, max_tokens: int) -> None:
    if (body.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"min_tokens must be at most max_tokens, which is {max_tokens} here.", "min_tokens"
        )


def _completion_tokens(body: CompletionRequest) -> int:
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise RequestError(f"best_of must equal n, which is {n} here.", "best_of")
    if len(body.prompt) * n > MAX_STREAMS:
        raise RequestError(f"Prompts times n must be at most {MAX_STREAMS}.", "n")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens must be at least 1, unless echo is true.", "max_tokens")
    return _DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens


def _chat_tokens(body: ChatRequest) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; send only the latter.", "max_tokens"
        )
    return old if new is None else new


def _shared(service: ClusterRouter, body: SamplingFields) -> dict[str, Any]:
    """The sampling parameters that both endpoints have, where they are set."""
    values = dict(body.sampling())
    if "seed" in values:
        values["seed"] %= _SEEDS
    if "top_k" in values:
        # Above the vocabulary it means the same, and stays within the engine's integers.
        values["top_k"] = min(values["top_k"], service.model.vocab_size)
    return values


def _generate(
    prompt: Prompt | tuple[Message, ...], sampling: SamplingParams, body: SamplingFields
) -> GenerateRequest:
    return GenerateRequest(
        **as_prompt(prompt),
        sampling=sampling,
        adaptation="auto" if body.adaptation is None else body.adaptation,
        namespace=body.namespace or DEFAULT_NAMESPACE,
        learn=body.learn is not False,
        timeout_s=body.timeout_s,
    )


def as_prompt(prompt: Prompt | tuple[Message, ...]) -> dict[str, Any]:
    """The field of GenerateRequest that `prompt` belongs in."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt[0], Message):
        return {"messages": prompt}
    return {"prompt_tokens": prompt}


def as_messages(turns: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """A conversation as the service takes it."""
    return tuple(Message(role=turn.role, content=turn.content, name=turn.name) for turn in turns)


def _echo(service: ClusterRouter, body: CompletionRequest, prompt: Prompt) -> str | None:
    """Text to put before the answer; see CompletionLayout."""
    if not body.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    return None if body.logprobs is not None else service.text(prompt)


def _answer(
    service: ClusterRouter,
    prefix: str,
    kinds: tuple[str, str],
    prepared: Sequence[TokenizedRequest],
    layouts: Sequence[Callable[[], Layout]],
    body: SamplingFields,
) -> Answer:
    """Fan every prepared prompt out into `n` choices, in OpenAI's order."""
    id = f"{prefix}-{uuid4().hex}"
    n = body.n or 1
    choices: list[Choice] = []
    for request, layout in zip(prepared, layouts, strict=True):
        for sample in range(n):
            index = len(choices)
            numbered = _sample(request, f"{id}-{index}", sample)
            several = len(prepared) > 1
            choices.append(Choice(index, numbered, layout(), several, is_sample=sample > 0))
    prompt_tokens = sum(len(request.prompt_tokens) for request in prepared)
    return Answer(id, service.model.name, kinds, choices, prompt_tokens)


def _sample(request: TokenizedRequest, id: str, sample: int) -> TokenizedRequest:
    """Sample number `sample` of a request: its own id, and its own seed where there is one."""
    seed = request.sampling.seed
    if seed is not None and sample:
        request = _with(request, seed=(seed + sample) % _SEEDS)
    return replace(request, request_id=id)


def _with(request: TokenizedRequest, **changes: Any) -> TokenizedRequest:
    return replace(request, sampling=request.sampling.model_copy(update=changes))
