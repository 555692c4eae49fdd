from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.update import HEAD, LoraDelta, Site, UpdateSpec
from cluster_router.wire.errors import DeltaError, OverloadedError
from cluster_router.wire.types import AdapterKey, SamplingParams
from lm_workers.adapters import OFF, AdapterBank
from lm_workers.build import step_budget
from lm_workers.config import EngineConfig
from lm_workers.kv_cache import BlockPool
from lm_workers.scheduler import Scheduler
from lm_workers.sequence import Batch, Sequence, Status

SPEC = UpdateSpec("head", 2, 4, (Site(HEAD, 4, 4),))


def delta(cluster: int) -> LoraDelta:
    return LoraDelta.static(AdapterKey("base", "hyper", cluster, 0), SPEC)


def sequence(
    name: str, length: int, arrival: float, cluster: int | None = None, output: int = 8
) -> Sequence:
    return Sequence(
        name,
        list(range(length)),
        SamplingParams(max_tokens=output),
        None if cluster is None else delta(cluster),
        detokenizer=None,  # type: ignore[arg-type]
        seed=0,
        arrival=arrival,
    )


def scheduler(blocks: int = 100, adapters: int = 2, **config: object) -> Scheduler:
    settings = {"max_sequences": 4, "max_batch_tokens": 16, "block_size": 4, "max_wait_s": 1.0}
    bank = AdapterBank(SPEC, init_bases(SPEC, 0), adapters, torch.float32, "cpu")
    pool = BlockPool(blocks + 1, 4)
    checked = EngineConfig.model_validate({**settings, **config})
    budget = step_budget(checked, "cpu", torch.float32)
    return Scheduler(checked, budget, pool, bank)


def run(one: Scheduler, now: float) -> list[tuple[str, int]]:
    """Schedule, pretend the model ran, and say which sequences got how many tokens."""
    batch = one.schedule(now)
    advance(one, batch)
    one.check_integrity()
    return [(span.sequence.request_id, span.length) for span in batch.spans]


def advance(one: Scheduler, batch: Batch) -> list[Sequence]:
    finished = []
    for span in batch.spans:
        one.complete(span)
        if span.samples:
            span.sequence.tokens.append(0)
            if span.sequence.num_outputs == span.sequence.sampling.max_tokens:
                one.finish(span.sequence)
                finished.append(span.sequence)
    return finished


def test_long_prompts_are_chunked_beside_running_streams() -> None:
    one = scheduler()
    one.add(sequence("short", 3, 0.0))
    one.add(sequence("long", 40, 0.1))
    assert run(one, 0.2) == [("short", 3), ("long", 13)]
    assert run(one, 0.2) == [("short", 1), ("long", 15)]
    assert run(one, 0.2) == [("short", 1), ("long", 12)]
    assert one.running[0].num_outputs == 3


def test_warm_clusters_first_then_cold_by_arrival() -> None:
    one = scheduler(adapters=4, max_sequences=2, max_batch_tokens=4)
    one.add(sequence("a", 2, 0.0, cluster=1, output=1))
    run(one, 0.0)
    one.add(sequence("cold", 2, 0.1, cluster=2))
    one.add(sequence("warm", 2, 0.2, cluster=1))
    assert [name for name, _ in run(one, 0.3)] == ["warm", "cold"]


def test_an_overdue_request_goes_first_and_is_not_passed() -> None:
    one = scheduler(adapters=1, max_sequences=2)
    one.add(sequence("holder", 2, 0.0, cluster=1))
    run(one, 0.0)
    one.add(sequence("cold", 2, 0.1, cluster=2))
    one.add(sequence("warm", 2, 0.5, cluster=1))
    assert one._bank is not None and not one._bank.can_acquire(delta(2))
    assert [name for name, _ in run(one, 1.2)] == ["holder"], "warm must not pass the overdue cold"
    one.finish(one.running[0])
    assert [name for name, _ in run(one, 1.3)] == ["cold"]


def test_before_it_is_overdue_warm_requests_may_pass_a_blocked_cold_one() -> None:
    one = scheduler(adapters=1, max_sequences=2)
    one.add(sequence("holder", 2, 0.0, cluster=1))
    run(one, 0.0)
    one.add(sequence("cold", 2, 0.1, cluster=2))
    one.add(sequence("warm", 2, 0.5, cluster=1))
    assert {name for name, _ in run(one, 0.6)} == {"holder", "warm"}


def test_preemption_takes_the_youngest_and_it_starts_over() -> None:
    one = scheduler(blocks=6, max_sequences=2)
    one.add(sequence("old", 8, 0.0, output=12))
    one.add(sequence("young", 6, 0.1, output=8))
    seen: list[Sequence] = []
    for step in range(60):
        batch = one.schedule(float(step))
        seen += advance(one, batch)
        one.check_integrity()
        if not one.has_work:
            break
    assert [(s.request_id, s.num_outputs) for s in seen] == [("old", 12), ("young", 8)]
    assert seen[0].preemptions == 0
    assert seen[1].preemptions >= 1


def test_full_queues_refuse() -> None:
    one = scheduler(max_queued=2)
    one.add(sequence("a", 2, 0.0))
    one.add(sequence("b", 2, 0.0))
    with pytest.raises(OverloadedError, match="2 requests are waiting"):
        one.add(sequence("c", 2, 0.0))


def test_a_malformed_update_is_never_loaded() -> None:
    spec = SPEC
    bank = AdapterBank(spec, init_bases(spec, 0), 1, torch.float32, "cpu")
    key = AdapterKey("b", "h", 0, 0)
    bad = LoraDelta(key, np.full((1, 2, 2), np.nan, np.float16), np.zeros(4, np.float16))
    with pytest.raises(DeltaError, match="NaN"):
        bank.acquire(bad)
    assert bank.resident == ()
    bank.check_integrity([])
    assert bank.acquire(delta(0)) != OFF


def test_a_sequence_whose_update_cannot_be_loaded_still_waits_in_its_queue() -> None:
    one = scheduler()
    waiting = sequence("bad", 2, 0.0, cluster=1)
    key = AdapterKey("b", "h", 0, 0)
    waiting.delta = LoraDelta(key, np.zeros((1, 2, 2), np.float16), np.full(4, np.inf, np.float16))
    one.add(waiting)
    with pytest.raises(DeltaError):
        one.schedule(0.0)
    one.check_integrity()
    one.finish(waiting)
    assert not one.has_work


def test_random_traffic_keeps_every_invariant() -> None:
    random.seed(0)
    one = scheduler(blocks=24, adapters=3, max_sequences=4, max_queued=1000)
    alive: dict[str, Sequence] = {}
    finished = 0
    for step in range(3000):
        if random.random() < 0.3:
            cluster = random.choice([None, 0, 1, 2, 3, 4, 5])
            new = sequence(
                str(step), random.randint(1, 40), float(step), cluster, random.randint(1, 20)
            )
            one.add(new)
            alive[new.request_id] = new
        if alive and random.random() < 0.05:
            one.finish(alive.pop(random.choice(list(alive))))
        batch = one.schedule(float(step))
        assert batch.num_tokens <= 16
        assert len({span.sequence.request_id for span in batch.spans}) == len(batch.spans)
        for done in advance(one, batch):
            del alive[done.request_id]
            finished += 1
        one.check_integrity()
        assert all(s.status in (Status.RUNNING, Status.WAITING) for s in alive.values())
    assert finished > 300
