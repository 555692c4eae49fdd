"""Sharing of KV blocks: the index alone, and what the engine makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch

from adapter_gen.apply import init_bases
from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth, LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.types import (
    AdapterKey,
    Assignment,
    SamplingParams,
    TokenChunk,
    TokenizedRequest,
)
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.engine import Engine
from lm_workers.kv_cache import BlockPool
from lm_workers.models import load_causal_lm
from lm_workers.prefix_cache import PrefixCache, extend_keys
from lm_workers.sequence import Batch

CONFIG = EngineConfig(
    dtype="float32",
    max_sequences=4,
    max_batch_tokens=24,
    block_size=4,
    kv_cache_tokens=1024,
    cpu_threads=1,
)
SYSTEM = tuple(range(40, 62))  # 22 tokens: five full blocks and a half


def keys(tokens: list[int], salt: str = "") -> list[bytes]:
    found: list[bytes] = []
    extend_keys(found, tokens, 4, salt)
    return found


def test_a_key_stands_for_everything_up_to_its_block() -> None:
    one, other = keys([1, 2, 3, 4, 5, 6, 7, 8, 9]), keys([9, 2, 3, 4, 5, 6, 7, 8])
    assert len(one) == 2
    assert one[0] != other[0]
    assert one[1] != other[1], "equal blocks after unequal ones are not the same prefix"
    assert keys([1, 2, 3, 4]) == one[:1]
    assert not set(one) & set(keys([1, 2, 3, 4, 5, 6, 7, 8], salt="cluster"))


def test_keys_grow_with_the_text() -> None:
    grown: list[bytes] = []
    tokens = list(range(30))
    for length in (3, 4, 9, 30):
        extend_keys(grown, tokens[:length], 4, "salt")
    assert grown == keys(tokens, "salt")


def test_find_stops_at_the_first_unknown_block() -> None:
    cache, chain = PrefixCache(), keys(list(range(16)))
    for index in (0, 1, 3):
        cache.insert(chain[index], 10 + index)
    assert cache.find(chain) == [10, 11]
    cache.forget(10)
    assert cache.find(chain) == []
    assert 11 in cache and 10 not in cache and len(cache) == 2


def test_the_first_block_with_a_key_keeps_it() -> None:
    cache, chain = PrefixCache(), keys(list(range(4)))
    cache.insert(chain[0], 1)
    cache.insert(chain[0], 2)
    assert cache.find(chain) == [1] and 2 not in cache
    cache.forget(2)
    assert cache.find(chain) == [1]
    cache.check_integrity([(chain[0], 1), (chain[0], 2)])
    with pytest.raises(AssertionError, match="another prefix"):
        cache.check_integrity([(b"other", 1)])


def test_unused_blocks_are_evicted_in_order_of_use_and_the_end_of_a_prefix_first() -> None:
    cache = PrefixCache()
    pool = BlockPool(1 + 6, 4, cache)
    old, new = keys(list(range(8))), keys(list(range(50, 58)))
    held: list[list[int]] = []
    for chain in (old, new):
        blocks: list[int] = []
        pool.extend(blocks, 8)
        for key, block in zip(chain, blocks, strict=True):
            cache.insert(key, block)
        held.append(blocks)
    for blocks in held:
        pool.release(blocks)
    grown: list[int] = []
    left = []
    for tokens in (8, 12, 16, 20, 24):  # the two blocks without a prefix go first
        pool.extend(grown, tokens)
        left.append((len(cache.find(old)), len(cache.find(new))))
        pool.check_integrity([grown])
    assert left == [(2, 2), (1, 2), (0, 2), (0, 1), (0, 0)]


def test_a_shared_block_is_free_only_after_its_last_user() -> None:
    pool = BlockPool(1 + 3, 4, PrefixCache())
    first: list[int] = []
    pool.extend(first, 8)
    second = list(first)
    pool.share(second)
    pool.release(first)
    assert pool.free == 1
    pool.check_integrity([second])
    with pytest.raises(AssertionError, match="counted wrongly"):
        pool.check_integrity([])
    pool.release(second)
    assert pool.free == 3


class Update:
    """A random update of a model, strong enough to change what it says."""

    def __init__(self, path: Path, depth: Depth) -> None:
        model = load_causal_lm(path, torch.float32, "cpu")
        self.spec: UpdateSpec = discover_sites(model, depth, rank=4, alpha=2.0)
        bases, generator = init_bases(self.spec, seed=0), torch.Generator().manual_seed(1)
        self._normal = lambda shape: torch.randn(shape, generator=generator)
        self.bases = SharedBases(
            bases.u, bases.v, self._normal(bases.s0.shape), self._normal(bases.shift.shape)
        )

    def delta(self, cluster: int) -> LoraDelta:
        key = AdapterKey("base", "hyper", cluster, 1)
        shapes = LoraDelta.static(key, self.spec).arrays()
        arrays = {name: self._normal(array.shape).half().numpy() for name, array in shapes.items()}
        return LoraDelta(key, **arrays)


def ask(
    engine: Engine, name: str, prompt: tuple[int, ...], delta: LoraDelta | None, **params: object
) -> list[TokenChunk]:
    fields = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, **params}
    sampling = SamplingParams.model_validate(fields)
    engine.add(TokenizedRequest(name, prompt, sampling, Assignment(key=None)), delta)
    chunks = []
    while engine.has_work:
        chunks += engine.step()
        engine.check_integrity()
    return chunks


def tokens(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]


@pytest.mark.parametrize(("depth", "shared"), [("head", True), ("paper", True), ("full", False)])
def test_clusters_share_prefixes_unless_their_updates_reach_below_the_head(
    tiny_llama: Path, depth: Depth, shared: bool
) -> None:
    update = Update(tiny_llama, depth)
    deltas = [None, update.delta(0), update.delta(1)]
    plain = build_engine(
        tiny_llama,
        CONFIG.model_copy(update={"prefix_cache": False}),
        (update.spec, update.bases),
    )
    engine = build_engine(tiny_llama, CONFIG, (update.spec, update.bases))
    cached, found, expected = [], [], []
    for number in range(6):
        prompt, delta = (*SYSTEM, 100 + number), deltas[number % 3]
        chunks = ask(engine, str(number), prompt, delta)
        cached.append(chunks[0].cached_tokens)
        assert all(chunk.cached_tokens == 0 for chunk in chunks[1:])
        found.append(tokens(chunks))
        alone = ask(plain, str(number), prompt, delta)
        expected.append(tokens(alone))
        assert alone[0].cached_tokens == 0
    assert found == expected
    assert cached == ([0, 20, 20, 20, 20, 20] if shared else [0, 0, 0, 20, 20, 20])
    stats = engine.stats
    assert (stats.cached_tokens, stats.prompt_tokens) == (sum(cached), 6 * 23)
    assert stats.hit_rate == pytest.approx(sum(cached) / (6 * 23))
    assert stats.kv_free == 1.0 and plain.stats.hit_rate == 0


def test_the_last_token_of_a_known_prompt_is_computed_again(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, CONFIG)
    prompt = SYSTEM[:8]
    first, again = ask(engine, "a", prompt, None), ask(engine, "b", prompt, None)
    assert tokens(first) == tokens(again)
    assert [first[0].cached_tokens, again[0].cached_tokens] == [0, 4]


def test_an_answer_is_known_when_the_conversation_goes_on(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, CONFIG)
    plain = build_engine(tiny_llama, CONFIG.model_copy(update={"prefix_cache": False}))
    answer = tokens(ask(engine, "a", SYSTEM, None))
    longer = (*SYSTEM, *answer, 7, 8, 9)
    chunks = ask(engine, "b", longer, None)
    # The last token of the answer was never read, so 22 + 7 tokens are known: seven blocks.
    assert chunks[0].cached_tokens == 28
    assert tokens(chunks) == tokens(ask(plain, "b", longer, None))


def test_scored_prompts_are_computed_whole(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, CONFIG)
    prompt = (*SYSTEM, 7)
    scored = []
    for number in range(2):
        [chunk] = ask(engine, str(number), prompt, None, max_tokens=0, prompt_logprobs=0)
        assert chunk.cached_tokens == 0
        assert chunk.prompt_logprobs is not None
        scored.append([entry.logprob for entry in chunk.prompt_logprobs])
    assert len(scored[0]) == 23
    assert scored[1][1:] == pytest.approx(scored[0][1:])
    assert ask(engine, "after", prompt, None)[0].cached_tokens == 20


def test_nothing_is_known_of_a_step_that_failed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(tiny_llama, CONFIG)
    step = engine._runner.step

    def broken(batch: Batch) -> NoReturn:
        step(batch)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "step", broken)
        with pytest.raises(MemoryError):
            ask(engine, "bad", SYSTEM, None)
    engine.abort_all()
    engine.check_integrity()
    assert ask(engine, "good", SYSTEM, None)[0].cached_tokens == 0
