"""`POST /v1/completions`: the request, and how its answer is laid out."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema

from cluster_router.openai.common import TEXTS, TOKENS, SamplingFields, allow, is_token
from cluster_router.openai.logprobs import LegacyLogprobs
from cluster_router.wire.types import TokenChunk

MAX_PROMPTS = 2048

Prompt = str | tuple[int, ...]


def _prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and len(value) > 0:
        if all(map(is_token, value)):
            return (tuple(value),)
        if len(value) > MAX_PROMPTS:
            raise ValueError(f"Send at most {MAX_PROMPTS} prompts in one request.")
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item and all(map(is_token, item)) for item in value):
            return tuple(map(tuple, value))
    raise ValueError(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists, "
        "and no list may be empty."
    )


Prompts = Annotated[
    tuple[Prompt, ...],
    PlainValidator(_prompts),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, TEXTS, TOKENS, {"type": "array", "items": TOKENS}]}
    ),
]


class CompletionRequest(SamplingFields):
    """OpenAI's completion request, with this service's extensions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Default 16. 0 is allowed with `echo`, and scores the prompt."
    )
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="How many alternatives to report at each token."
    )
    best_of: int | None = Field(None, description="Must equal `n`.")
    suffix: Annotated[
        str | None, allow(None, "", otherwise="suffix is not supported; leave it out.")
    ] = Field(None, description="Only `null` or empty: nothing is written before a given end.")


class CompletionLayout:
    """One choice of a completion.

    Args:
        echo: text that goes before the answer; empty for none, None to spell out the tokens of
            `prompt_logprobs`, which hold their exact bytes.
        logprobs: whether to report log-probabilities.
    """

    kinds = ("text_completion", "text_completion")

    def __init__(self, echo: str | None, logprobs: bool) -> None:
        self._echo = echo
        self._logprobs = LegacyLogprobs() if logprobs else None

    def opening(self) -> None:
        """Completions begin with their text."""

    def delta(self, chunk: TokenChunk) -> dict[str, Any]:
        """The text that `chunk` adds; the first chunk's comes after the echo."""
        prompt = chunk.prompt_logprobs or ()
        echo, self._echo = self._echo, ""
        if echo is None:
            echo = b"".join(entry.raw for entry in prompt).decode("utf-8", "replace")
        entries = (*prompt, *chunk.logprobs)
        return {
            "text": echo + chunk.text,
            "logprobs": None if self._logprobs is None else self._logprobs.take(entries),
        }

    def whole(self, answer: TokenChunk) -> dict[str, Any]:
        """The whole text."""
        return self.delta(answer)
