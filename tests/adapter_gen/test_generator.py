import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter_gen.bundle import Bundle
from adapter_gen.cache import DeltaCache
from adapter_gen.codec import encode_delta
from adapter_gen.generator import AdapterGenerator
from adapter_gen.hypernetwork import CoreConfig, CoreHypernetwork, Generated
from adapter_gen.update import Depth, LoraDelta
from cluster_router.refinements import RefinementStore
from cluster_router.wire.errors import BundleError, ConfigError, DeltaError, SetupError
from cluster_router.wire.types import AdapterKey, Conditioning

MakeBundle = Callable[..., Bundle]


class GatedHypernetwork(CoreHypernetwork):
    """Holds each generation until the test opens the door, and can be told to fail."""

    door = threading.Event()
    calls = 0
    fails = False

    def forward(self, vector: torch.Tensor, support: torch.Tensor) -> Generated:
        type(self).calls += 1
        assert type(self).door.wait(10)
        if type(self).fails:
            raise DeltaError("told to fail")
        return super().forward(vector, support)


@pytest.fixture
async def gated(make_bundle: MakeBundle) -> AsyncIterator[AdapterGenerator]:
    GatedHypernetwork.door.clear()
    GatedHypernetwork.calls, GatedHypernetwork.fails = 0, False
    spec = make_bundle("full").spec
    generator = AdapterGenerator(
        make_bundle("full", hypernetwork=GatedHypernetwork(CoreConfig(width=8), spec, 12))
    )
    yield generator
    GatedHypernetwork.door.set()
    generator.close()


def ask(generator: AdapterGenerator, row: int) -> tuple[AdapterKey, Conditioning]:
    snapshot = generator.bundle.snapshot
    return generator.bundle.key(snapshot, row), snapshot.conditioning_of(row)


async def until_called(calls: int) -> None:
    while GatedHypernetwork.calls < calls:
        await asyncio.sleep(0.001)


async def test_get_equals_the_hypernetwork_and_is_cached(
    make_bundle: MakeBundle, depth: Depth
) -> None:
    generator = AdapterGenerator(make_bundle(depth))
    key, conditioning = ask(generator, 2)
    delta = await generator.get(key, conditioning)
    expected = generator.bundle.hypernetwork(
        torch.tensor(conditioning.vector)[None], torch.tensor([conditioning.support])
    )
    for name, tensor in vars(expected).items():
        array = getattr(delta, name)
        assert (tensor is None) == (array is None)
        assert tensor is None or np.array_equal(array, tensor[0].half().numpy())
    assert await generator.get(key, conditioning) is delta
    stats = generator.stats()
    assert (stats.hits, stats.misses, stats.generated, stats.entries) == (1, 1, 1, 1)
    assert stats.bytes == delta.nbytes == 2 * generator.bundle.spec.numbers_per_cluster
    assert stats.generation_seconds > 0
    generator.close()


async def test_static_update_needs_no_conditioning(make_bundle: MakeBundle, depth: Depth) -> None:
    generator = AdapterGenerator(make_bundle(depth))
    key = generator.bundle.key(generator.bundle.snapshot, None)
    delta = await generator.get(key, None)
    delta.check(generator.bundle.spec)
    for name in ("cores", "shift", "lora_b"):
        array = getattr(delta, name)
        assert array is None or not array.any()
    generator.close()


async def test_concurrent_misses_generate_once(gated: AdapterGenerator) -> None:
    key, conditioning = ask(gated, 1)
    waiters = [asyncio.create_task(gated.get(key, conditioning)) for _ in range(20)]
    await until_called(1)
    GatedHypernetwork.door.set()
    deltas = await asyncio.gather(*waiters)
    assert GatedHypernetwork.calls == 1
    assert all(delta is deltas[0] for delta in deltas)
    assert (gated.stats().misses, gated.stats().generated) == (20, 1)


async def test_event_loop_runs_while_generating(gated: AdapterGenerator) -> None:
    waiter = asyncio.create_task(gated.get(*ask(gated, 1)))
    await until_called(1)
    await asyncio.sleep(0.01)
    assert not waiter.done()
    GatedHypernetwork.door.set()
    await waiter


async def test_cancelled_caller_leaves_the_generation_to_the_others(
    gated: AdapterGenerator,
) -> None:
    key, conditioning = ask(gated, 1)
    first = asyncio.create_task(gated.get(key, conditioning))
    second = asyncio.create_task(gated.get(key, conditioning))
    await until_called(1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    GatedHypernetwork.door.set()
    delta = await second
    assert GatedHypernetwork.calls == 1
    assert await gated.get(key, conditioning) is delta


async def test_generation_outlives_its_only_caller(gated: AdapterGenerator) -> None:
    key, conditioning = ask(gated, 1)
    only = asyncio.create_task(gated.get(key, conditioning))
    await until_called(1)
    only.cancel()
    with pytest.raises(asyncio.CancelledError):
        await only
    GatedHypernetwork.door.set()
    await gated.get(key, conditioning)
    assert GatedHypernetwork.calls == 1


async def test_failure_reaches_every_waiter_and_is_not_cached(gated: AdapterGenerator) -> None:
    key, conditioning = ask(gated, 1)
    GatedHypernetwork.fails = True
    waiters = [asyncio.create_task(gated.get(key, conditioning)) for _ in range(5)]
    await until_called(1)
    GatedHypernetwork.door.set()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert all(isinstance(result, DeltaError) for result in results)
    assert GatedHypernetwork.calls == 1
    GatedHypernetwork.fails = False
    assert (await gated.get(key, conditioning)).key == key
    assert (gated.stats().generated, gated.stats().entries) == (1, 1)


async def test_failure_with_no_waiter_left_is_not_reported_as_lost(
    gated: AdapterGenerator,
) -> None:
    lost: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
    GatedHypernetwork.fails = True
    key, conditioning = ask(gated, 1)
    only = asyncio.create_task(gated.get(key, conditioning))
    await until_called(1)
    only.cancel()
    await asyncio.gather(only, return_exceptions=True)
    GatedHypernetwork.door.set()
    while gated._in_flight:
        await asyncio.sleep(0.001)
    GatedHypernetwork.fails = False
    await gated.get(key, conditioning)
    asyncio.get_running_loop().set_exception_handler(None)
    assert lost == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "0" * 16}, "base model"),
        ({"hypernetwork": "0" * 16}, "load the same bundle"),
    ],
)
@pytest.mark.parametrize("cluster", [None, 10])
async def test_refuses_keys_of_another_bundle(
    make_bundle: MakeBundle, change: dict[str, str], message: str, cluster: int | None
) -> None:
    generator = AdapterGenerator(make_bundle())
    own = {"base": "f" * 16, "hypernetwork": generator.bundle.hypernetwork_id}
    key = AdapterKey(**{**own, **change}, cluster=cluster, version=1)
    with pytest.raises(DeltaError, match=message):
        await generator.get(key, Conditioning(np.zeros(12, np.float32), 1))
    generator.close()


@pytest.mark.parametrize(
    ("conditioning", "message"),
    [
        (None, "needs its conditioning"),
        (Conditioning(np.full(12, np.nan, np.float32), 1), "NaN"),
        (Conditioning(np.zeros(12, np.float32), float("nan")), "NaN"),
        (Conditioning(np.zeros(12, np.float32), -1), "negative"),
        (Conditioning(np.zeros(5, np.float32), 1), "must be"),
    ],
)
async def test_refuses_bad_conditioning(
    make_bundle: MakeBundle, conditioning: Conditioning | None, message: str
) -> None:
    generator = AdapterGenerator(make_bundle())
    key, good = ask(generator, 0)
    with pytest.raises(DeltaError, match=message):
        await generator.get(key, conditioning)
    assert (await generator.get(key, good)).key == key
    generator.close()


async def test_refuses_an_update_that_is_not_finite(make_bundle: MakeBundle) -> None:
    module = make_bundle("full").hypernetwork
    with torch.no_grad():
        module.cores.weight.fill_(6e4)
        module.mix[1].weight.fill_(6e4)
    generator = AdapterGenerator(make_bundle(hypernetwork=module))
    with pytest.raises(DeltaError, match="NaN or infinity"):
        await generator.get(*ask(generator, 0))
    generator.close()


async def test_memory_stays_within_bounds(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    one = 2 * bundle.spec.numbers_per_cluster
    with pytest.raises(ConfigError, match="max_bytes"):
        AdapterGenerator(bundle, max_bytes=one - 1)
    generator = AdapterGenerator(bundle, max_bytes=2 * one)
    for row in (0, 1, 0, 2, 0, 3):
        await generator.get(*ask(generator, row))
    stats = generator.stats()
    assert (stats.bytes, stats.entries) == (2 * one, 2)
    assert (stats.hits, stats.misses, stats.evicted) == (2, 4, 2)
    generator.close()


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), max_size=60), st.integers(80, 160)
)
def test_cache_never_exceeds_its_bytes_and_drops_the_oldest(
    uses: list[tuple[int, int]], max_bytes: int
) -> None:
    cache, order = DeltaCache(max_bytes), []
    for cluster, numbers in uses:
        key = AdapterKey("b", "h", cluster, numbers)
        if cache.get(key) is None:
            cache[key] = LoraDelta(key, shift=np.zeros(numbers, np.float16))
        order = [other for other in order if other != key] + [key]
        held = [other for other in order if other in cache]
        assert sum(2 * other.version for other in held) == cache.currsize <= max_bytes
        assert held == order[len(order) - len(held) :]
        order = held


def nan_in_cores(delta: LoraDelta) -> LoraDelta:
    return replace(delta, cores=np.full_like(delta.cores, np.nan))


def of_another_rank(delta: LoraDelta) -> LoraDelta:
    assert delta.cores is not None
    return replace(delta, cores=delta.cores[:, :2])


def test_a_refined_update_is_read_and_what_the_generator_makes_stands_in_for_it(
    make_bundle: MakeBundle, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = make_bundle("full")
    made = AdapterGenerator(bundle)
    key, conditioning = ask(made, 2)
    generated = made.generate(key, conditioning)
    assert generated.cores is not None
    kept = {"cafe": encode_delta(replace(generated, cores=generated.cores + 1))}
    generator = AdapterGenerator(bundle, refined=kept.get)
    refined = replace(key, version=0, refinement="cafe")
    found = generator.generate(refined, conditioning)
    assert found.key == refined
    assert found.cores is not None
    assert np.array_equal(found.cores, generated.cores + 1)
    assert np.array_equal(generator.generate(key, conditioning).cores, generated.cores)

    for spoil in (nan_in_cores, of_another_rank):
        kept["cafe"] = encode_delta(spoil(generated))
        with caplog.at_level(logging.ERROR):
            stand_in = generator.generate(refined, conditioning)
        assert np.array_equal(stand_in.cores, generated.cores)
    kept["cafe"] = b"torn"
    assert np.array_equal(generator.generate(refined, conditioning).cores, generated.cores)
    assert [" is not served refined" in record.message for record in caplog.records] == [True] * 3
    kept.clear()
    assert np.array_equal(generator.generate(refined, conditioning).cores, generated.cores)
    made.close()
    generator.close()


async def test_what_stands_in_for_a_refined_update_is_never_taken_for_it(
    make_bundle: MakeBundle,
) -> None:
    kept: dict[str, bytes] = {}
    generator = AdapterGenerator(make_bundle("full"), refined=kept.get)
    key, conditioning = ask(generator, 2)
    generated = await generator.get(key, conditioning)
    assert generated.cores is not None
    refined = replace(key, version=0, refinement="cafe")
    stand_in = await generator.get(refined, conditioning)
    assert np.array_equal(stand_in.cores, generated.cores)
    again = generator.generate(refined, conditioning)
    elsewhere = await generator.get(refined, generator.bundle.snapshot.conditioning_of(1))
    assert again.key == stand_in.key, "equal weights"
    assert len({one.key.id for one in (generated, stand_in, elsewhere)} | {refined.id}) == 4
    kept["cafe"] = encode_delta(replace(generated, cores=generated.cores + 1))
    found = await generator.get(refined, conditioning)
    assert found.key == refined
    assert np.array_equal(found.cores, generated.cores + 1), "it is there again"
    generator.close()


async def test_a_refined_update_that_cannot_be_read_now_is_asked_for_again(
    make_bundle: MakeBundle, tmp_path: Path
) -> None:
    folder = tmp_path / "refined"
    store = RefinementStore(str(folder))
    generator = AdapterGenerator(make_bundle("full"), refined=store.load)
    key, conditioning = ask(generator, 2)
    data = encode_delta(await generator.get(key, conditioning))
    store.save(("tenant", 2), data)
    [refinement] = store.newest().values()
    refined = replace(key, version=0, refinement=refinement.id)

    away = folder.rename(tmp_path / "away")
    folder.symlink_to(folder)  # a folder that cannot be listed
    for _ in range(2):
        with pytest.raises(SetupError, match="cannot list"):
            await generator.get(refined, conditioning)
    folder.unlink()
    away.rename(folder)
    [file] = folder.iterdir()
    file.unlink()
    file.mkdir()  # a file that cannot be read
    with pytest.raises(BundleError, match="cannot read"):
        await generator.get(refined, conditioning)
    file.rmdir()
    file.write_bytes(data[:-1])  # and one that is damaged for good
    assert (await generator.get(refined, conditioning)).key != refined
    file.write_bytes(data)
    assert (await generator.get(refined, conditioning)).key == refined
    assert generator.stats().failed == 3
    generator.close()


async def test_a_storage_that_hangs_holds_up_refined_updates_only(make_bundle: MakeBundle) -> None:
    asked, answers = threading.Event(), threading.Event()

    def hang(_: str) -> bytes | None:
        asked.set()
        assert answers.wait(10)
        return None

    generator = AdapterGenerator(make_bundle("full"), refined=hang)
    key, conditioning = ask(generator, 2)
    refined = replace(key, version=0, refinement="cafe")
    waiter = asyncio.create_task(generator.get(refined, conditioning))
    assert await asyncio.to_thread(asked.wait, 10)
    async with asyncio.timeout(5):
        await generator.get(key, conditioning)
    assert not waiter.done()
    answers.set()
    await waiter
    generator.close()
