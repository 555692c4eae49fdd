"""Engine: schedule -> step -> postprocess."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import torch

from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import ChameleonError, EngineError, OverloadedError
from cluster_router.wire.types import TokenChunk, TokenizedRequest, TokenLogprob
from lm_workers.answer import check_request, extend
from lm_workers.detokenizer import Detokenizer, TokenTexts
from lm_workers.runner import ModelRunner, StepOutput, scored_rows
from lm_workers.sampler import Sampled, Sampler, score
from lm_workers.scheduler import Scheduler
from lm_workers.sequence import Batch, Sequence, Span, Status

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now and has done.

    Attributes:
        running, waiting: requests.
        tokens_ahead: tokens of all these that are not computed yet, answers at their longest.
        prompt_tokens: of all requests admitted so far.
        cached_tokens: those of them that the prefix cache held.
        generated_tokens: of all answers so far.
        preemptions: how often a request had to make room and start over.
        kv_free: share of the KV cache that no running request uses.
        adapters: updates resident on the device.
        adapter_loads: updates brought there so far.
        adapter_evictions: of these, how many pushed out another.
    """

    running: int
    waiting: int
    tokens_ahead: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    kv_free: float
    adapters: int
    adapter_loads: int
    adapter_evictions: int

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that did not have to be computed."""
        return self.cached_tokens / max(1, self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed and is dropped, while those beside it go on."""

    request_id: str
    error: ChameleonError


class SteppedEngine(Protocol):
    """What an LMWorker drives, from one thread: the Engine below, or a VllmEngine."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        ...

    @property
    def num_running(self) -> int:
        """Requests being computed."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests in the queues."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counts since the start."""
        ...

    def add(self, request: TokenizedRequest, delta: LoraDelta | None) -> None:
        """Queue a request under `delta` (None: unadapted); a ChameleonError refuses it."""
        ...

    def abort(self, request_id: str) -> None:
        """Drop a request, at any moment; unknown or finished ids are ignored."""
        ...

    def abort_all(self) -> list[str]:
        """Drop every request and return their ids."""
        ...

    def step(self) -> Items[TokenChunk | Failure]:
        """Advance every running request and return what became certain."""
        ...

    def check_integrity(self) -> None:
        """Assert that nothing is lost or held twice."""
        ...


class Engine:
    """Runs requests of any clusters in one continuously refilled batch.

    Not thread-safe: one thread adds, aborts and steps.

    Args:
        runner: the model.
        scheduler: decides what a step computes.
        sampler: chooses tokens.
        texts: tokenizer with per-token texts.
        eos: token ids that end an answer.
        max_context: longest prompt plus output.
        vocabulary: ids of tokens are below.
        clock: seconds, monotonic; orders arrivals.

    Raises:
        ModelError: the model cannot be run with texts of `max_context` tokens.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        texts: TokenTexts,
        eos: frozenset[int],
        max_context: int,
        vocabulary: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        runner.check_context(max_context)
        self._runner, self._scheduler, self._sampler = runner, scheduler, sampler
        self._texts, self._eos = texts, eos
        self._max_context, self._vocabulary = max_context, vocabulary
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        """Requests being computed."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queues."""
        return self._scheduler.num_waiting

    @property
    def stats(self) -> EngineStats:
        """Counts since the start."""
        scheduler, bank = self._scheduler, self._scheduler.bank
        return EngineStats(
            running=self.num_running,
            waiting=self.num_waiting,
            tokens_ahead=sum(one.max_length - one.computed for one in self._sequences.values()),
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.preemptions,
            kv_free=scheduler.kv_free,
            adapters=0 if bank is None else len(bank.resident),
            adapter_loads=0 if bank is None else bank.loads,
            adapter_evictions=0 if bank is None else bank.evictions,
        )

    def add(self, request: TokenizedRequest, delta: LoraDelta | None) -> None:
        """Queue a request under the update `delta` (None: unadapted), which it keeps to its end.

        Raises:
            RequestError: the prompt is empty or holds what is no token, or the id is in use.
            ContextLengthError: prompt and output exceed the context.
            OverloadedError: the queues are full, or there is no room for a background request.
        """
        check_request(request, self._max_context, self._vocabulary, self._sequences)
        if request.background and not self._scheduler.has_room:
            raise OverloadedError("there is no room for background work now")
        params, prompt = request.sampling, list(request.prompt_tokens)
        sequence = Sequence(
            request_id=request.request_id,
            prompt=prompt,
            sampling=params,
            delta=delta,
            detokenizer=Detokenizer(self._texts.tokenizer, prompt, params.stop),
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            arrival=self._clock(),
        )
        self._scheduler.add(sequence)
        self._sequences[request.request_id] = sequence

    def abort(self, request_id: str) -> None:
        """Drop a request, at any moment; unknown or finished ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.finish(sequence)

    def abort_all(self) -> list[str]:
        """Drop every request and return their ids."""
        names = list(self._sequences)
        for name in names:
            self.abort(name)
        return names

    def step(self) -> list[TokenChunk | Failure]:
        """Advance every running request and return what became certain."""
        batch = self._scheduler.schedule(self._clock())
        if not batch.spans:
            return []
        output = self._runner.step(batch)
        return [*self._score_prompts(batch, output), *self._postprocess(batch, output)]

    def check_integrity(self) -> None:
        """Assert that nothing is lost or held twice: blocks, slots, queues, requests."""
        self._scheduler.check_integrity()
        held = [one.request_id for one in self._scheduler.running]
        held += [one.request_id for queue in self._scheduler.queues.values() for one in queue]
        assert sorted(held) == sorted(self._sequences), "requests lost or held twice"

    def _score_prompts(self, batch: Batch, output: StepOutput) -> list[Failure]:
        failures = []
        for span, offset in zip(batch.spans, output.offsets, strict=True):
            if span.scores:
                score_prompt = partial(self._score_prompt, span, offset, output)
                failed = self._alone(span.sequence, score_prompt)
                if failed is not None:
                    failures.append(failed)
        return failures

    def _score_prompt(self, span: Span, offset: int, output: StepOutput) -> None:
        """Score the prompt tokens that this span's positions predict."""
        sequence = span.sequence
        found, tokens = sequence.prompt_logprobs, sequence.tokens
        if not found:
            found.append(self._texts.logprob(tokens[0], None))
        # Position p predicts token p + 1; a preempted sequence passes scored positions again.
        first = max(span.start, len(found) - 1)
        last = min(span.stop, sequence.prompt_length - 1)
        top = sequence.sampling.prompt_logprobs or 0
        for positions in scored_rows(list(range(first, last))):
            logits = self._runner.logits(output, [offset + p - span.start for p in positions])
            following = [tokens[p + 1] for p in positions]
            targets = torch.tensor(following, dtype=torch.int64, device=logits.device)
            scores = score(logits, targets, [top] * len(positions))
            found.extend(self._logprob(one) for one in scores)

    def _postprocess(self, batch: Batch, output: StepOutput) -> list[TokenChunk | Failure]:
        sampling, rows = [], []
        outcomes: list[TokenChunk | Failure] = []
        for span, offset in zip(batch.spans, output.offsets, strict=True):
            sequence = span.sequence
            if sequence.status is Status.FINISHED:
                continue  # scoring its prompt failed
            self._scheduler.complete(span)
            if span.samples:
                sampling.append(sequence)
                rows.append(offset + span.length - 1)
            elif sequence.pending == 0:
                outcomes.append(self._alone(sequence, partial(self._finish_scoring, sequence)))
        if sampling:
            sampled = self._sample(self._runner.logits(output, rows), sampling)
            for sequence, one in zip(sampling, sampled, strict=True):
                if isinstance(one, Failure):
                    outcomes.append(one)
                else:
                    advance = partial(self._advance, sequence, one)
                    outcomes.append(self._alone(sequence, advance))
        return outcomes

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> Items[Sampled | Failure]:
        try:
            return self._sampler.sample(logits, sequences)
        except Exception as error:
            # One row's parameters must not fail the others; alone each draws the same token.
            log.warning("sampling %d rows failed (%r); each is tried alone", len(sequences), error)
            return [
                self._alone(one, partial(self._sample_one, logits[row : row + 1], one))
                for row, one in enumerate(sequences)
            ]

    def _sample_one(self, logits: torch.Tensor, sequence: Sequence) -> Sampled:
        [sampled] = self._sampler.sample(logits, [sequence])
        return sampled

    def _alone(self, sequence: Sequence, compute: Callable[[], T]) -> T | Failure:
        """What `compute` gives; where it fails, so does its request, and no other."""
        try:
            return compute()
        except Exception as error:
            name = sequence.request_id
            log.exception("request %s failed; those beside it go on", name)
            self.abort(name)
            if isinstance(error, ChameleonError):
                return Failure(name, error)
            return Failure(name, EngineError("the engine failed at this request; please retry"))

    def _finish_scoring(self, sequence: Sequence) -> TokenChunk:
        """End a request that asked for no tokens."""
        sequence.finish_reason = "length"
        self._retire(sequence)
        return self._chunk(sequence, "", (), ())

    def _advance(self, sequence: Sequence, sampled: Sampled) -> TokenChunk:
        """Append a sampled token, see whether the answer is over, and say what is new."""
        self._generated_tokens += 1
        text = extend(sequence, sampled.token, self._eos)
        if sequence.finish_reason is not None:
            self._retire(sequence)
        wanted = sequence.sampling.logprobs is not None
        logprobs = (self._logprob(sampled),) if wanted else ()
        return self._chunk(sequence, text, (sampled.token,), logprobs)

    def _chunk(
        self,
        sequence: Sequence,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
    ) -> TokenChunk:
        first = sequence.num_outputs <= 1
        scored = first and sequence.sampling.prompt_logprobs is not None
        return TokenChunk(
            request_id=sequence.request_id,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if scored else None,
            cached_tokens=(sequence.cached_tokens or 0) if first else 0,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _logprob(self, sampled: Sampled) -> TokenLogprob:
        top = tuple(self._texts.logprob(token, value) for token, value in sampled.top)
        return self._texts.logprob(sampled.token, sampled.logprob, top)

    def _retire(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        del self._sequences[sequence.request_id]
