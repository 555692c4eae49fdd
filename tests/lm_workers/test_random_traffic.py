"""Ten thousand steps of random traffic: nothing is lost, and every answer is the one given alone.

Arrivals, cancellations, preemptions, adapter swaps, shared beginnings and scored prompts, on a
model small enough to do so in seconds. A failure names its seed and step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adapter_gen.apply import init_bases
from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth, LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.errors import OverloadedError
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
from lm_workers.models import load_causal_lm

STEPS = 10_000
VOCAB = 320
LONGEST_OUTPUT = 24
CLUSTERS = 4
CONFIG = EngineConfig(
    dtype="float32",
    max_sequences=5,
    max_batch_tokens=24,
    prefill_chunk=10,
    block_size=4,
    kv_cache_tokens=128,
    max_context=112,
    max_adapters=2,
    max_queued=12,
    cpu_threads=1,
)
ALONE = CONFIG.model_copy(
    update={"prefix_cache": False, "max_batch_tokens": 128, "prefill_chunk": 128}
)


@pytest.fixture(scope="module")
def smallest(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Two layers of 16 numbers, with weights large enough that its answers are clear-cut.

    Two, so that keys and values depend on the tokens before them.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
    )
    path = tmp_path_factory.mktemp("smallest")
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Kind:
    """A request up to its length: the same kind gives the same tokens, however many are asked."""

    prompt: tuple[int, ...]
    cluster: int | None
    temperature: float


@dataclass
class Traffic:
    """Draws requests; knows what each must answer.

    Attributes:
        alone: an engine that runs one request at a time and caches nothing.
    """

    alone: Engine
    deltas: list[LoraDelta]
    source: random.Random
    kinds: list[Kind] = field(init=False)
    _answers: dict[Kind, list[int]] = field(default_factory=dict)
    _scores: dict[Kind, list[float | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = self.source.randrange
        systems = [tuple(draw(2, VOCAB) for _ in range(length)) for length in (0, 30, 60)]
        # Another beginning, then the same tokens at the same positions: no prefix to share.
        systems.append((*systems[1][4:8], *systems[1][4:]))
        users = [tuple(draw(2, VOCAB) for _ in range(draw(1, 24))) for _ in range(6)]
        self.kinds = [
            Kind(system + user, cluster, temperature)
            for system in systems
            for user in users
            for cluster in (None, *range(CLUSTERS))
            for temperature in (0.0, 0.8)
        ]

    def delta(self, kind: Kind) -> LoraDelta | None:
        return None if kind.cluster is None else self.deltas[kind.cluster]

    def request(self, name: str, kind: Kind, **fields: object) -> TokenizedRequest:
        sampling = SamplingParams.model_validate(
            {"ignore_eos": True, "temperature": kind.temperature, "seed": 5, **fields}
        )
        return TokenizedRequest(name, kind.prompt, sampling, Assignment(key=None))

    def draw(self, name: str) -> tuple[Kind, TokenizedRequest]:
        kind = self.source.choice(self.kinds)
        fields: dict[str, object] = {"max_tokens": self.source.randint(1, LONGEST_OUTPUT)}
        if self.source.random() < 0.1:
            fields["prompt_logprobs"] = 0
            fields["max_tokens"] = self.source.choice([0, 5])
        return kind, self.request(name, kind, **fields)

    def check(self, kind: Kind, request: TokenizedRequest, chunks: list[TokenChunk]) -> None:
        """Assert that `chunks` are what the request gets when it runs alone."""
        if kind not in self._answers:
            self._answers[kind], self._scores[kind] = self._run_alone(kind)
        found = [token for chunk in chunks for token in chunk.tokens]
        assert found == self._answers[kind][: request.sampling.max_tokens]
        assert chunks[-1].finish_reason == "length"
        if request.sampling.prompt_logprobs is not None:
            scores = [entry.logprob for entry in chunks[0].prompt_logprobs or ()]
            assert scores[0] is None and len(scores) == len(kind.prompt)
            assert scores[1:] == pytest.approx(self._scores[kind][1:], abs=1e-3)

    def _run_alone(self, kind: Kind) -> tuple[list[int], list[float | None]]:
        request = self.request("alone", kind, max_tokens=LONGEST_OUTPUT, prompt_logprobs=0)
        self.alone.add(request, self.delta(kind))
        chunks: list[TokenChunk] = []
        while self.alone.has_work:
            chunks += self.alone.step()
        scores = [entry.logprob for entry in chunks[0].prompt_logprobs or ()]
        return [token for chunk in chunks for token in chunk.tokens], scores


def deltas_for(path: Path, depth: Depth) -> tuple[UpdateSpec, SharedBases, list[LoraDelta]]:
    spec = discover_sites(load_causal_lm(path, torch.float32, "cpu"), depth, rank=2)
    bases, generator = init_bases(spec, seed=0), torch.Generator().manual_seed(1)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    bases = SharedBases(bases.u, bases.v, normal(bases.s0.shape), normal(bases.shift.shape))
    deltas = []
    for cluster in range(CLUSTERS):
        key = AdapterKey("base", "hyper", cluster, 1)
        shapes = LoraDelta.static(key, spec).arrays()
        arrays = {name: normal(array.shape).half().numpy() for name, array in shapes.items()}
        deltas.append(LoraDelta(key, **arrays))
    return spec, bases, deltas


def drive(engine: Engine, traffic: Traffic, steps: int, tick: Callable[[], None]) -> int:
    """Run random traffic for `steps` steps; returns how many answers were checked."""
    source, finished = traffic.source, 0
    open_: dict[str, tuple[Kind, TokenizedRequest, list[TokenChunk]]] = {}
    for step in range(steps):
        # Waves: the queues fill up, refuse, and run dry.
        if source.random() < (0.5 if step // 200 % 2 else 0.1):
            kind, request = traffic.draw(str(step))
            try:
                engine.add(request, traffic.delta(kind))
                open_[request.request_id] = kind, request, []
            except OverloadedError:
                pass
        if open_ and source.random() < 0.03:
            name = source.choice(sorted(open_))
            engine.abort(name)
            del open_[name]
        tick()
        for chunk in engine.step():
            open_[chunk.request_id][2].append(chunk)
            if chunk.finish_reason is not None:
                traffic.check(*open_.pop(chunk.request_id))
                finished += 1
        engine.check_integrity()
    return finished


@pytest.mark.parametrize(("depth", "seed", "steps"), [("full", 0, STEPS), ("head", 1, STEPS // 4)])
def test_random_traffic_loses_nothing_and_answers_as_if_alone(
    smallest: Path, depth: Depth, seed: int, steps: int
) -> None:
    print(f"depth {depth}, seed {seed}")
    spec, bases, deltas = deltas_for(smallest, depth)
    engine = build_engine(smallest, CONFIG, (spec, bases))
    alone = build_engine(smallest, ALONE, (spec, bases))
    now = 0.0

    def tick() -> None:
        nonlocal now
        now += 0.02

    engine._clock = lambda: now
    loaded: set[tuple[str, ...]] = set()
    bank = engine._scheduler._bank
    assert bank is not None

    def tick_and_look() -> None:
        tick()
        loaded.add(bank.resident)

    traffic = Traffic(alone, deltas, random.Random(seed))
    finished = drive(engine, traffic, steps, tick_and_look)
    assert finished > steps // 20
    stats = engine.stats
    # The run is worth nothing if one of these never happened.
    assert stats.preemptions > steps // 200, stats
    assert 0.02 < stats.hit_rate < 0.98, stats
    assert len(loaded) > CLUSTERS, "updates were never swapped"
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    assert engine.stats.kv_free == 1.0
