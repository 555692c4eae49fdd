"""`POST /v1/chat/completions`: the request, and how its answer is laid out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from cluster_router.openai.common import SamplingFields, Strict, allow
from cluster_router.openai.logprobs import chat_logprobs
from cluster_router.wire.types import TokenChunk

_NO_TOOLS = "Tool calls are not supported; send the request without {}."


def _text(value: object) -> str:
    """Content as one string; the texts of parts are joined."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("A message's content must be a string or a non-empty list of text parts.")
    return "".join(map(_part_text, value))


def _part_text(part: object) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError('A content part must look like {"type": "text", "text": "..."}.')
    if part["type"] != "text":
        raise ValueError(
            f"Content parts of type {part['type'][:40]!r} are not supported: this model reads text."
        )
    if set(part) != {"type", "text"} or not isinstance(part["text"], str):
        raise ValueError('A text part has exactly "type" and "text", and both are strings.')
    return part["text"]


_PARTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
        "additionalProperties": False,
    },
}
Content = Annotated[
    str,
    BeforeValidator(_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]}),
    Field(description="Text, or parts of text, which are joined. No images, sound or files."),
]


class ChatMessage(Strict):
    """One turn. The fields that can only be null let an earlier answer be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None
    tool_call_id: str | None = Field(None, description="Accepted; changes nothing.")
    tool_calls: Annotated[Any, allow(None, [], otherwise=_NO_TOOLS.format("tool_calls"))] = Field(
        None, description="Only `null` or `[]`: there are no tools."
    )
    function_call: Annotated[Any, allow(None, otherwise=_NO_TOOLS.format("function_call"))] = Field(
        None, description="Only `null`: there are no functions."
    )
    refusal: Annotated[
        Any, allow(None, otherwise="Send a refusal as content; refusal is not supported.")
    ] = Field(None, description="Only `null`: a refusal is text like any other.")
    audio: Annotated[Any, allow(None, otherwise="Audio is not supported; send text.")] = Field(
        None, description="Only `null`: there is no sound."
    )
    annotations: Annotated[
        Any, allow(None, [], otherwise="annotations are not supported; leave them out.")
    ] = Field(None, description="Only `null` or `[]`: answers have none.")


class ChatRequest(SamplingFields):
    """OpenAI's chat request, with this service's extensions.

    Fields that ask for something this service does not do are accepted only with the value that
    asks for nothing.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Default: what the context leaves."
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Older name of `max_completion_tokens`."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Needs `logprobs: true`."
    )

    metadata: dict[str, str] | None = Field(None, description="Accepted; changes nothing.")
    safety_identifier: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_key: str | None = Field(None, description="Accepted; changes nothing.")
    prompt_cache_retention: str | None = Field(None, description="Accepted; changes nothing.")
    parallel_tool_calls: bool | None = Field(None, description="Accepted; there are no tools.")

    response_format: Annotated[
        Any,
        allow(None, {"type": "text"}, otherwise='response_format can only be {"type": "text"}.'),
    ] = Field(None, description='Only `{"type": "text"}`: no JSON mode, no JSON schema.')
    tools: Annotated[Any, allow(None, [], otherwise=_NO_TOOLS.format("tools"))] = Field(
        None, description="Only `null` or `[]`: tool calls are not supported."
    )
    tool_choice: Annotated[
        Any, allow(None, "none", "auto", otherwise=_NO_TOOLS.format("tool_choice"))
    ] = Field(None, description="Only `none` or `auto`: there are no tools.")
    functions: Annotated[Any, allow(None, [], otherwise=_NO_TOOLS.format("functions"))] = Field(
        None, description="Older name of `tools`. Only `null` or `[]`."
    )
    function_call: Annotated[
        Any, allow(None, "none", "auto", otherwise=_NO_TOOLS.format("function_call"))
    ] = Field(None, description="Older name of `tool_choice`. Only `none` or `auto`.")
    store: Annotated[
        Any, allow(None, False, otherwise="Answers are not stored; leave store out.")
    ] = Field(None, description="Only `false`: answers are not stored.")
    service_tier: Annotated[
        Any, allow(None, "auto", "default", otherwise="service_tier can only be auto or default.")
    ] = Field(None, description="Only `auto` or `default`: there is one tier.")
    reasoning_effort: Annotated[
        Any,
        allow(None, "none", otherwise="This model does not reason; leave reasoning_effort out."),
    ] = Field(None, description="Only `none`: nothing is thought before the answer.")
    verbosity: Annotated[Any, allow(None, "medium", otherwise="verbosity cannot be set.")] = Field(
        None, description="Only `medium`, which changes nothing."
    )
    modalities: Annotated[
        Any, allow(None, ["text"], otherwise='modalities can only be ["text"].')
    ] = Field(None, description='Only `["text"]`: answers are text.')
    audio: Annotated[Any, allow(None, otherwise="Audio output is not supported.")] = Field(
        None, description="Only `null`: there is no sound."
    )
    prediction: Annotated[Any, allow(None, otherwise="prediction is not supported.")] = Field(
        None, description="Only `null`: predicted outputs are not supported."
    )
    web_search_options: Annotated[Any, allow(None, otherwise="Web search is not supported.")] = (
        Field(None, description="Only `null`: there is no web search.")
    )


class ChatLayout:
    """One choice of a chat answer.

    Args:
        top_logprobs: how many alternatives to report at each token; None for no log-probabilities.
    """

    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, top_logprobs: int | None) -> None:
        self._top = top_logprobs

    def opening(self) -> dict[str, Any]:
        """The role comes first, alone."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, chunk: TokenChunk) -> dict[str, Any]:
        """The text that `chunk` adds."""
        return {"delta": {"content": chunk.text}, "logprobs": self._logprobs(chunk)}

    def whole(self, answer: TokenChunk) -> dict[str, Any]:
        """The whole message."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(answer)}

    def _logprobs(self, chunk: TokenChunk) -> dict[str, Any] | None:
        return None if self._top is None else chat_logprobs(chunk.logprobs, self._top)
