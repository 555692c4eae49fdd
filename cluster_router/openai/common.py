"""Request fields that completions and chat share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
)

from cluster_router.wire.types import Namespace, Timeout

MAX_STOPS = 16
MAX_CHOICES = 128

NAMESPACE = (
    "Extension. Tenant whose clusters are used; each has its own, which no other tenant's prompts "
    "move. At most 128 printable characters."
)
INTEGER = {"type": "integer", "minimum": 0}
TOKENS = {"type": "array", "items": INTEGER, "minItems": 1}
TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}


def is_token(value: object) -> bool:
    """Whether `value` is a JSON integer from zero up (`true` is not one)."""
    return type(value) is int and value >= 0


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    good = isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)
    if not good or len(texts) > MAX_STOPS:  # type: ignore[arg-type]
        raise ValueError(f"stop must be a non-empty string, or up to {MAX_STOPS} of them.")
    return tuple(texts)  # type: ignore[arg-type]


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise ValueError("logit_bias must be an object that maps token ids to numbers.")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise ValueError(f"logit_bias names {key[:20]!r}, which is not a token id.")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"logit_bias for token {key} must be a number from -100 to 100.")
        biases[int(key)] = bias
    return biases


def _adaptation(value: object) -> str | int:
    if isinstance(value, int) and is_token(value):
        return value
    if isinstance(value, str) and value in ("auto", "off"):
        return value
    raise ValueError("adaptation must be 'auto', 'off' or the number of a cluster.")


def allow(*values: object, otherwise: str) -> BeforeValidator:
    """Accept a field only where it asks for what happens anyway; refuse it by name elsewhere."""

    def check(value: Any) -> Any:
        if not any(value is allowed or value == allowed for allowed in values):
            raise ValueError(otherwise)
        return value

    return BeforeValidator(check)


Stop = Annotated[
    tuple[str, ...],
    PlainValidator(_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, TEXTS | {"maxItems": MAX_STOPS}]}),
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(_logit_bias),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
]
AdaptationChoice = Annotated[
    Literal["auto", "off"] | int,
    PlainValidator(_adaptation),
    WithJsonSchema({"anyOf": [{"enum": ["auto", "off"]}, INTEGER], "default": "auto"}),
]


class Strict(BaseModel):
    """JSON types are taken as they are, unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """Options that need `stream: true`."""

    include_usage: bool | None = Field(
        None, description="Send the token counts in a last chunk with empty choices."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="Extension. With `include_usage`: the counts so far in every chunk."
    )
    include_obfuscation: Annotated[
        bool | None,
        allow(False, None, otherwise="stream_options.include_obfuscation must be false."),
    ] = Field(None, description="Only `false`: nothing is added to hide how long texts are.")


class SamplingFields(Strict):
    """Fields of both endpoints that say how tokens are chosen. `null` means the default."""

    model: str = Field(description="The served model, as `/v1/models` names it.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    stop: Stop | None = None
    seed: int | None = None
    user: str | None = Field(None, description="Accepted; changes nothing.")

    top_k: Annotated[int, Field(ge=0)] | None = Field(None, description="Extension. 0 is off.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="Extension.")
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="Extension."
    )
    min_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="Extension.")
    ignore_eos: bool | None = Field(None, description="Extension.")
    stop_token_ids: (
        Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)] | None
    ) = Field(None, description="Extension. Token ids that end the answer.")
    adaptation: AdaptationChoice | None = Field(
        None,
        description="Extension. `auto` assigns a cluster, `off` uses the unadapted base model, "
        "a number forces that cluster.",
    )
    namespace: Namespace | None = Field(None, description=NAMESPACE)
    learn: bool | None = Field(
        None,
        description="Extension. By default clusters learn from the prompt's embedding; `false` "
        "keeps it out of all statistics.",
    )
    timeout_s: Timeout | None = Field(
        None,
        description="Extension. Seconds in which the answer must be complete; it ends with an "
        "error then. The service may allow less.",
    )

    def sampling(self) -> Iterator[tuple[str, Any]]:
        """The fields that `SamplingParams` has by the same name, where they are set."""
        for name in _PLAIN:
            value = getattr(self, name)
            if value is not None:
                yield name, value


_PLAIN = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "seed",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
)
