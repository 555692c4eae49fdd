"""Sequence: one request inside the engine. Batch: what one step runs."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from enum import Enum, auto

from adapter_gen.update import LoraDelta
from cluster_router.wire.types import FinishReason, SamplingParams, TokenLogprob
from lm_workers.detokenizer import Detokenizer


class Status(Enum):
    """Where a sequence is."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Tokens of one request and how far they are computed.

    A step computes the keys and values of the tokens not yet computed (the prompt, in chunks; later
    the token sampled last). Whenever none are left, the next token is sampled. A preempted sequence
    simply has nothing computed.

    The update is pinned here at admission: `delta` never changes, None runs unadapted.
    `cached_tokens` is what the prefix cache held of the prompt; None before the first admission.
    """

    def __init__(
        self,
        request_id: str,
        prompt: Tokens[int],
        sampling: SamplingParams,
        delta: LoraDelta | None,
        detokenizer: Detokenizer,
        seed: int,
        arrival: float,
    ) -> None:
        self.request_id = request_id
        self.sampling = sampling
        self.delta = delta
        self.detokenizer = detokenizer
        self.seed = seed
        self.arrival = arrival
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.computed = 0
        self.blocks: list[int] = []
        self.prefix_keys: list[bytes] = []
        self.cached_tokens: int | None = None
        self.slot: int | None = None
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.prompt_logprobs: list[TokenLogprob] = []
        self.preemptions = 0

    @property
    def queue(self) -> str:
        """Name of the queue it waits in: its update's id, or `off`."""
        return "off" if self.delta is None else self.delta.key.id

    @property
    def outputs(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def num_outputs(self) -> int:
        """How many tokens are generated so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def max_length(self) -> int:
        """Prompt plus everything it may generate."""
        return self.prompt_length + self.sampling.max_tokens

    @property
    def reusable(self) -> int:
        """Tokens that may come from a cache: all whose logits nobody needs any more."""
        if self.wants_prompt_logprobs:
            return max(0, len(self.prompt_logprobs) - 1)
        return len(self.tokens) - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions still have to be scored."""
        return (
            self.sampling.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.prompt_length
        )


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens `start:stop` of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens in the span."""
        return self.stop - self.start

    @property
    def samples(self) -> bool:
        """Whether the step ends with a new token for this sequence."""
        return self.stop == len(self.sequence.tokens) and self.sequence.sampling.max_tokens > 0

    @property
    def scores(self) -> bool:
        """Whether the step scores prompt positions of this sequence."""
        return self.sequence.wants_prompt_logprobs and self.start < self.sequence.prompt_length


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step runs: decoding spans (one token each) first, then prefill chunks."""

    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the step."""
        return sum(span.length for span in self.spans)

    @property
    def only_decodes(self) -> bool:
        """Whether every span is one token."""
        return self.spans[-1].length == 1
