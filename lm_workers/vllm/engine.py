"""VllmEngine: vLLM's engine behind the protocol of the built-in one."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

from vllm import LLMEngine, RequestOutput

from adapter_gen.update import LoraDelta
from cluster_router.wire.errors import (
    ChameleonError,
    EngineError,
    OverloadedError,
    RequestError,
)
from cluster_router.wire.types import SamplingParams, TokenChunk, TokenizedRequest, TokenLogprob
from lm_workers.answer import check_request, extend
from lm_workers.detokenizer import Detokenizer, TokenTexts
from lm_workers.engine import EngineStats
from lm_workers.sequence import Sequence
from lm_workers.vllm.adapters import Adapter, AdapterFolders
from lm_workers.vllm.counters import Counters
from lm_workers.vllm.sampling import convert

log = logging.getLogger(__name__)


@dataclass
class _Running:
    """A request that vLLM has, under a number of ours, which is never used again."""

    number: str
    sequence: Sequence
    adapter: Adapter | None


@dataclass(frozen=True)
class Limits:
    """What a VllmEngine takes: tokens of a request, ids of tokens, requests run and held."""

    context: int
    vocabulary: int
    sequences: int
    queued: int


class VllmEngine:
    """Runs requests in vLLM, tokens in and tokens out; text is made here as in the other engine.

    Not thread-safe: one thread adds, aborts and steps.

    Args:
        engine: vLLM's, without a tokenizer.
        counters: records what `engine` tells of itself.
        adapters: updates as folders; None serves the base alone.
        blank: what unadapted requests run under where vLLM needs something; None is nothing.
        texts: tokenizer with per-token texts.
        eos: token ids that end an answer.
        limits: what it takes.
        refuse: raises RequestError for sampling parameters that `engine` cannot honour.
    """

    def __init__(
        self,
        engine: LLMEngine,
        counters: Counters,
        adapters: AdapterFolders | None,
        blank: Adapter | None,
        texts: TokenTexts,
        eos: frozenset[int],
        limits: Limits,
        refuse: Items[Callable[[SamplingParams], None]] = (),
    ) -> None:
        self._engine, self._counters = engine, counters
        self._adapters, self._blank = adapters, blank
        self._texts, self._eos, self._limits, self._refuse = texts, eos, limits, refuse
        self._numbers = itertools.count()
        self._held: dict[str, _Running] = {}
        self._names: dict[str, str] = {}
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._held)

    @property
    def num_running(self) -> int:
        """Requests being computed; vLLM may hold some of them back for a moment."""
        return min(len(self._held), self._limits.sequences)

    @property
    def num_waiting(self) -> int:
        """Requests beyond those."""
        return len(self._held) - self.num_running

    @property
    def stats(self) -> EngineStats:
        """Counts since the start."""
        adapters = self._adapters
        sequences = [one.sequence for one in self._held.values()]
        return EngineStats(
            running=self.num_running,
            waiting=self.num_waiting,
            tokens_ahead=sum(one.max_length - one.computed for one in sequences),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._counters.preemptions,
            kv_free=self._kv_free,
            adapters=0 if adapters is None else len(adapters),
            adapter_loads=0 if adapters is None else adapters.loads,
            adapter_evictions=0 if adapters is None else adapters.evictions,
        )

    def add(self, request: TokenizedRequest, delta: LoraDelta | None) -> None:
        """Queue a request under the update `delta` (None: unadapted), which it keeps to its end.

        Raises:
            RequestError: the prompt is empty or holds an unknown token, the id is in use, or vLLM
                cannot do what is asked.
            ContextLengthError: prompt and output exceed the context.
            OverloadedError: the queues are full, or there is no room for a background request.
            DeltaError: the update does not fit.
        """
        check_request(request, self._limits.context, self._limits.vocabulary, self._held)
        self._check_more(request)
        number = str(next(self._numbers))
        adapter = self._acquire(delta)
        try:
            self._submit(number, request, adapter)
        except Exception as error:
            self._release(adapter)
            raise _ours(error) from error
        self._held[request.request_id] = _Running(number, self._sequence(request, delta), adapter)
        self._names[number] = request.request_id

    def abort(self, request_id: str) -> None:
        """Drop a request, at any moment; unknown or finished ids are ignored."""
        if request_id in self._held:
            self._abort(self._retire(request_id))

    def abort_all(self) -> list[str]:
        """Drop every request and return their ids."""
        names = list(self._held)
        for name in names:
            # It may be because vLLM failed that all are dropped.
            with contextlib.suppress(Exception):
                self.abort(name)
        return names

    def step(self) -> list[TokenChunk]:
        """Advance every running request and return what became certain."""
        outputs = self._engine.step()
        # One that was aborted may still have something to say.
        known = [one for one in outputs if one.request_id in self._names]
        return [self._advance(one) for one in known if isinstance(one, RequestOutput)]

    def check_integrity(self) -> None:
        """Assert that no request is lost or held twice, here or there, and no update either."""
        assert self._engine.get_num_unfinished_requests() == len(self._held), "requests differ"
        assert sorted(self._names.values()) == sorted(self._held), "requests lost or held twice"
        if self._adapters is not None:
            adapted = sum(one.adapter is not None for one in self._held.values())
            assert self._adapters.users == adapted, "updates lost or held twice"

    @property
    def _kv_free(self) -> float:
        return 1 - self._counters.kv_use if self._held else 1.0

    def _check_more(self, request: TokenizedRequest) -> None:
        limits = self._limits
        for refuse in self._refuse:
            refuse(request.sampling)
        few = 2 * len(self._held) < limits.sequences and self._kv_free > 0.5
        if request.background and not few:
            raise OverloadedError("there is no room for background work now")
        if len(self._held) >= limits.sequences + limits.queued:
            raise OverloadedError(f"{self.num_waiting} requests are waiting; try again later")

    def _acquire(self, delta: LoraDelta | None) -> Adapter | None:
        if delta is None:
            return None
        if self._adapters is None:
            raise EngineError("this engine was built without a bundle and runs no updates")
        return self._adapters.acquire(delta)

    def _release(self, adapter: Adapter | None) -> None:
        if adapter is not None and self._adapters is not None:
            self._adapters.release(adapter)

    def _submit(self, number: str, request: TokenizedRequest, adapter: Adapter | None) -> None:
        adapter = adapter or self._blank
        params = convert(request.sampling, self._eos, adapter.shift if adapter else None)
        lora = None if adapter is None else adapter.request()
        prompt: Any = {"prompt_token_ids": list(request.prompt_tokens)}
        self._engine.add_request(number, prompt, params, lora_request=lora)

    def _sequence(self, request: TokenizedRequest, delta: LoraDelta | None) -> Sequence:
        prompt, params = list(request.prompt_tokens), request.sampling
        return Sequence(
            request_id=request.request_id,
            prompt=prompt,
            sampling=params,
            delta=delta,
            detokenizer=Detokenizer(self._texts.tokenizer, prompt, params.stop),
            seed=0,  # vLLM has its own
            arrival=0.0,
        )

    def _advance(self, output: RequestOutput) -> TokenChunk:
        name = self._names[output.request_id]
        sequence = self._held[name].sequence
        first = not sequence.num_outputs
        if first:
            sequence.cached_tokens = output.num_cached_tokens or 0
            self._prompt_tokens += sequence.prompt_length
            self._cached_tokens += sequence.cached_tokens
        text, tokens, logprobs = self._take(sequence, output)
        sequence.computed = len(sequence.tokens)
        if sequence.finish_reason is None and output.finished:
            text += self._ended_there(sequence, output)
        if sequence.finish_reason is not None:
            running = self._retire(name)
            if not output.finished:
                self._abort(running)
        scored = first and sequence.sampling.prompt_logprobs is not None
        return TokenChunk(
            request_id=name,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs(sequence, output) if scored else None,
            cached_tokens=(sequence.cached_tokens or 0) if first else 0,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _take(
        self, sequence: Sequence, output: RequestOutput
    ) -> tuple[str, tuple[int, ...], tuple[TokenLogprob, ...]]:
        """What is new, up to the token that ends the answer: vLLM may have computed more."""
        [completion] = output.outputs
        text, count, scores = "", 0, completion.logprobs or []
        if not sequence.sampling.max_tokens:
            sequence.finish_reason = "length"
            return "", (), ()
        for token in completion.token_ids:
            text += extend(sequence, token, self._eos)
            count += 1
            if sequence.finish_reason is not None:
                break
        tokens = tuple(completion.token_ids[:count])
        self._generated_tokens += count
        top = sequence.sampling.logprobs
        if top is None:
            return text, tokens, ()
        pairs = zip(tokens, scores, strict=False)
        return text, tokens, tuple(self._logprob(token, one, top) for token, one in pairs)

    def _ended_there(self, sequence: Sequence, output: RequestOutput) -> str:
        """vLLM ended an answer that was not over by our reading of it."""
        reason = output.outputs[0].finish_reason
        sequence.finish_reason = "length" if reason == "length" else "abort"
        return sequence.detokenizer.flush()

    def _prompt_logprobs(
        self, sequence: Sequence, output: RequestOutput
    ) -> tuple[TokenLogprob, ...]:
        top = sequence.sampling.prompt_logprobs or 0
        prompt, scores = sequence.tokens[: sequence.prompt_length], output.prompt_logprobs or []
        return tuple(
            self._texts.logprob(token, None) if one is None else self._logprob(token, one, top)
            for token, one in zip(prompt, scores, strict=True)
        )

    def _logprob(self, token: int, scores: Mapping[int, Any], top: int) -> TokenLogprob:
        ranked = sorted((one.rank, id, one.logprob) for id, one in scores.items())
        best = [self._texts.logprob(id, value) for rank, id, value in ranked if rank <= top]
        return self._texts.logprob(token, scores[token].logprob, tuple(best[:top]))

    def _retire(self, name: str) -> _Running:
        running = self._held.pop(name)
        del self._names[running.number]
        self._release(running.adapter)
        return running

    def _abort(self, running: _Running) -> None:
        self._engine.abort_request([running.number])


def _ours(error: Exception) -> ChameleonError:
    """What vLLM raised at a request's admission, in our words."""
    if isinstance(error, ChameleonError):
        return error
    if isinstance(error, ValueError):
        return RequestError(f"vLLM refuses this request: {error}")
    log.exception("vLLM failed to take a request", exc_info=error)
    return EngineError("the engine failed; please retry")
