"""Random updates of a small model, and traffic in which rows change places and clusters."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import torch

from adapter_gen.apply import init_bases
from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth, LoraDelta, SharedBases, UpdateSpec
from cluster_router.wire.types import AdapterKey, Assignment, SamplingParams, TokenizedRequest
from lm_workers.config import EngineConfig
from lm_workers.engine import Engine
from lm_workers.models import load_causal_lm

CONFIG = EngineConfig(
    dtype="float32",
    max_sequences=4,
    max_batch_tokens=64,
    block_size=4,
    kv_cache_tokens=1024,
    cpu_threads=1,
    kernels="reference",
    linear="plain",
)
NAMES = (f"r{number}" for number in range(10**9))
Asked = list[tuple[TokenizedRequest, LoraDelta | None]]


def request(prompt: Iterable[int], **params: object) -> TokenizedRequest:
    sampling = SamplingParams.model_validate({"max_tokens": 12, "temperature": 0, **params})
    return TokenizedRequest(next(NAMES), tuple(prompt), sampling, Assignment(key=None))


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    source = random.Random(7)
    return [
        [source.randrange(2, 300) for _ in range(source.randint(1, longest))] for _ in range(count)
    ]


def update_of(
    path: Path, depth: Depth = "full"
) -> tuple[UpdateSpec, SharedBases, list[LoraDelta | None]]:
    """Random bases, and the updates of three clusters after None."""
    spec = discover_sites(load_causal_lm(path, torch.float32, "cpu"), depth, rank=4, alpha=2.0)
    bases, generator = init_bases(spec, seed=0), torch.Generator().manual_seed(1)

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    bases = SharedBases(bases.u, bases.v, normal(bases.s0.shape), normal(bases.shift.shape))
    deltas: list[LoraDelta | None] = [None]
    for cluster in range(3):
        static = LoraDelta.static(AdapterKey("base", "hyper", cluster, 1), spec)
        arrays = {name: normal(one.shape).half().numpy() for name, one in static.arrays().items()}
        deltas.append(LoraDelta(static.key, **arrays))
    return spec, bases, deltas


def mixed(deltas: list[LoraDelta | None]) -> Asked:
    """More requests than run at once, of many lengths: rows change places and clusters."""
    return [
        (request(prompt, max_tokens=3 + 5 * (number % 4)), deltas[number % len(deltas)])
        for number, prompt in enumerate(prompts(12, longest=40))
    ]


def answers(engine: Engine, asked: Asked) -> list[list[int]]:
    for one, delta in asked:
        engine.add(one, delta)
    found: dict[str, list[int]] = {one.request_id: [] for one, _ in asked}
    while engine.has_work:
        for chunk in engine.step():
            found[chunk.request_id] += chunk.tokens
        engine.check_integrity()
    return list(found.values())
