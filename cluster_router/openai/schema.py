"""Shapes of the answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


class AdaptationInfo(TypedDict):
    """What adapted an answer. `adapter_key` names the weights: equal keys, equal weights.

    With `fallback` the cluster's update could not be had in time and the static one stood in.
    """

    mode: Literal["cluster", "static", "off"]
    cluster: int | None
    similarity: float | None
    adapter_key: str | None
    snapshot_version: int
    fallback: bool


class PromptTokensDetails(TypedDict):
    """`cached_tokens` of the prompt did not have to be computed again."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(TypedDict):
    """Parallel lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    adaptation: NotRequired[AdaptationInfo]


class Completion(TypedDict):
    """Answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    adaptation: AdaptationInfo
    choices: list[CompletionChoice]
    usage: Usage


class AnswerMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One chat answer."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    stop_reason: str | int | None


class ChatCompletion(TypedDict):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    adaptation: AdaptationInfo
    choices: list[ChatChoice]
    usage: Usage


class ModelInfo(TypedDict):
    """A served model. `context_length` is in tokens."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(TypedDict):
    """Answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelInfo]


class ClusterView(TypedDict):
    """A cluster of the current snapshot. `size` counts the prompts behind it.

    `refinement` counts how often its update has been refined on its own prompts.
    """

    id: int
    object: Literal["cluster"]
    size: int
    version: int
    adapter_key: str
    refinement: int
    characteristic_tokens: list[str]


class ClusterList(TypedDict):
    """Answer of `/v1/clusters`."""

    object: Literal["list"]
    snapshot_version: int
    data: list[ClusterView]


class AssignmentView(TypedDict):
    """Answer of `/v1/assign`."""

    object: Literal["assignment"]
    model: str
    adaptation: AdaptationInfo
    prompt_tokens: int
