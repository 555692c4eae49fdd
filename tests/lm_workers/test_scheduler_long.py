"""The scheduler with prompts of very different lengths, a tight KV cache and known prefixes."""

from __future__ import annotations

import random
from zlib import crc32

import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.update import HEAD, LoraDelta, Site, UpdateSpec
from cluster_router.wire.types import AdapterKey, SamplingParams
from lm_workers.adapters import AdapterBank
from lm_workers.build import step_budget
from lm_workers.config import EngineConfig
from lm_workers.kv_cache import BlockPool
from lm_workers.prefix_cache import PrefixCache
from lm_workers.scheduler import Scheduler
from lm_workers.sequence import Batch, Sequence, Span, Status

SPEC = UpdateSpec("head", 2, 4, (Site(HEAD, 4, 4),))
CHUNK = 64


def sequence(
    name: str,
    length: int,
    output: int = 8,
    arrival: float = 0.0,
    cluster: int | None = None,
    start: int = 0,
) -> Sequence:
    key = AdapterKey("base", "hyper", cluster, 0)
    return Sequence(
        name,
        list(range(start, start + length)),
        SamplingParams(max_tokens=output),
        None if cluster is None else LoraDelta.static(key, SPEC),
        detokenizer=None,  # type: ignore[arg-type]
        seed=0,
        arrival=arrival,
    )


def scheduler(
    tokens: int = 32_000, adapters: int = 4, context_cost: float = 0.0, **config: object
) -> Scheduler:
    settings = {"max_sequences": 32, "max_wait_s": 10.0, "prefill_chunk": CHUNK, **config}
    bank = AdapterBank(SPEC, init_bases(SPEC, 0), adapters, torch.float32, "cpu")
    pool = BlockPool(1 + tokens // 16, 16, PrefixCache())
    checked = EngineConfig.model_validate(settings)
    budget = step_budget(checked, "cpu", torch.float32)
    return Scheduler(checked, budget, pool, bank, context_cost)


def advance(one: Scheduler, batch: Batch) -> list[Span]:
    """Pretend that the model ran, with a token that says who sampled it and when."""
    sampled = [span for span in batch.spans if span.samples]
    for span in batch.spans:
        one.complete(span)
    for span in sampled:
        owner = span.sequence
        owner.tokens.append(crc32(f"{owner.request_id} {len(owner.tokens)}".encode()))
        if owner.num_outputs == owner.sampling.max_tokens:
            one.finish(owner)
    one.check_integrity()
    return sampled


def lengths(batch: Batch) -> dict[str, int]:
    return {span.sequence.request_id: span.length for span in batch.spans}


def test_no_step_beside_running_streams_holds_more_than_one_chunk_of_prompts() -> None:
    one, source = scheduler(), random.Random(0)
    streams = [sequence(f"s{i}", 20, output=1000, start=10_000 * i) for i in range(8)]
    for stream in streams:
        one.add(stream)
    while any(stream.num_outputs == 0 for stream in streams):
        advance(one, one.schedule(0.0))
    for number in range(6):
        length = source.choice([8000, 8000, 3, 60, 1500])
        one.add(sequence(f"p{number}", length, 1, 1.0, start=10**6 * (1 + number)))
    steps = 0
    while len(one.running) > len(streams) or one.queues:
        batch = one.schedule(1.0)
        found = lengths(batch)
        assert all(found[stream.request_id] == 1 for stream in streams), "a stream missed a step"
        assert batch.num_tokens <= len(streams) + CHUNK
        advance(one, batch)
        steps += 1
    assert steps >= 8000 // CHUNK


def test_tokens_far_into_a_prompt_count_for_more_beside_streams() -> None:
    one = scheduler(context_cost=1 / 1000)
    one.add(sequence("stream", 4, output=1000, start=10**6))
    advance(one, one.schedule(0.0))
    one.add(sequence("long", 8000))
    found = []
    while not found or found[-1][0] < 7500:
        batch = one.schedule(0.0)
        found += [(span.start, span.length) for span in batch.spans if span.length > 1]
        advance(one, batch)
    assert found[0] == (0, CHUNK)
    for start, length in found:
        price = 1 + start / 1000
        assert CHUNK - 3 * price < length * price <= CHUNK
    # A short one is no dearer for it.
    one.add(sequence("short", 20, output=1, start=2 * 10**6))
    assert lengths(one.schedule(0.0))["short"] == 20


def test_without_streams_a_prompt_takes_the_whole_step() -> None:
    one = scheduler(max_batch_tokens=512)
    one.add(sequence("long", 1000))
    assert lengths(one.schedule(0.0)) == {"long": 512}


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    one = scheduler()
    one.add(sequence("stream", 4, output=1000, start=5 * 10**6))
    advance(one, one.schedule(0.0))
    for name in ("long", "longer"):
        one.add(sequence(name, 8000, start=len(name) * 10**5))
        advance(one, one.schedule(0.0))
    one.add(sequence("short", 30, output=2, start=9 * 10**6))
    batch = one.schedule(0.0)
    assert lengths(batch) == {"stream": 1, "long": 34, "short": 30}
    assert [span.sequence.request_id for span in advance(one, batch)] == ["stream", "short"]
    # A stream of short prompts cannot stop the long one: it keeps half of every chunk.
    for number in range(100):
        one.add(sequence(f"more{number}", 30, output=1, start=10**8 + 100 * number))
        batch = one.schedule(0.0)
        assert lengths(batch)["long"] >= CHUNK // 2
        advance(one, batch)


def test_two_long_prompts_that_do_not_fit_together_run_one_after_the_other() -> None:
    one = scheduler(tokens=9600)
    asked = [sequence(f"p{number}", 6000, 4, number, start=10**5 * number) for number in range(2)]
    for each in asked:
        one.add(each)
    now = 2.0
    while one.has_work:
        advance(one, one.schedule(now))
    assert [each.preemptions for each in asked] == [0, 0]


def test_a_preempted_sequence_starts_where_the_cache_still_knows_it() -> None:
    one = scheduler(tokens=160, max_sequences=2)
    old = sequence("old", 40, 90, 0.0)
    young = sequence("young", 60, 60, 1.0, start=1000)
    one.add(old)
    one.add(young)
    starts = []
    while one.has_work:
        waited = young.status is Status.WAITING
        batch = one.schedule(2.0)
        starts += [span.start for span in batch.spans if waited and span.sequence is young]
        advance(one, batch)
    assert (old.preemptions, young.preemptions) == (0, 1)
    # The old one took nine of ten blocks in the end, so the first block of the young one is left.
    assert starts == [0, 16]
    assert (old.num_outputs, young.num_outputs) == (90, 60)


def test_a_burst_with_one_beginning_computes_it_about_once() -> None:
    one = scheduler(max_batch_tokens=512)
    system = list(range(400))
    for number in range(16):
        each = sequence(f"b{number}", 0, 4)
        each.tokens, each.prompt_length = [*system, 10_000 + number], 401
        one.add(each)
    computed = 0
    while one.has_work:
        batch = one.schedule(0.0)
        computed += sum(span.length for span in batch.spans)
        advance(one, batch)
    assert computed < 16 * (1 + 3) + 2 * 512
    assert one.cached_tokens >= 14 * 400 - 512 and one.prompt_tokens == 16 * 401


@pytest.mark.parametrize("seed", range(3))
def test_nothing_younger_passes_a_request_that_has_waited_long_enough(seed: int) -> None:
    source = random.Random(seed)
    one = scheduler(tokens=400, adapters=2, max_sequences=4, max_wait_s=20.0, max_queued=10_000)
    known: dict[str, Sequence] = {}
    passed_cold = overdue_admitted = 0
    for step in range(3400):
        now = float(step)
        if source.random() < 0.12:
            cluster = source.choice([None, 0, 0, 0, 1, 1, 2, 3, 4, 5])
            new = sequence(str(step), source.randint(1, 300), source.randint(1, 40), now, cluster)
            new.tokens = [*new.tokens[:-1], 10**6 + step]
            known[new.request_id] = new
            one.add(new)
        if known and source.random() < 0.02:
            one.finish(known.pop(source.choice(list(known))))
        before = {each for each in known.values() if each.status is Status.WAITING}
        batch = one.schedule(now)
        started = [each for each in before if each.status is Status.RUNNING]
        left = [each for each in before if each.status is Status.WAITING]
        for each in started:
            older = [other for other in left if other.arrival < each.arrival]
            passed_cold += bool(older)
            overdue_admitted += now - each.arrival >= 20
            assert all(now - other.arrival < 20 for other in older), f"seed {seed} step {step}"
        advance(one, batch)
        known = {n: each for n, each in known.items() if each.status is not Status.FINISHED}
    assert passed_cold and overdue_admitted and one.preemptions and one.cached_tokens
