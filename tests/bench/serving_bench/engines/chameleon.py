"""Our engine alone, without Ray and HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from serving_bench.clients import Arrival, drive
from serving_bench.workload import Request, Trace, Workload

from adapter_gen.bundle import Bundle
from adapter_gen.generator import AdapterGenerator
from adapter_gen.update import LoraDelta
from cluster_router.wire.types import AdapterKey, Assignment, SamplingParams, TokenizedRequest
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.engine import EngineStats
from lm_workers.memory import give_back


class ChameleonEngine:
    """An Engine with every cluster's update generated before the clock starts.

    As an LM replica does, it holds no bundle: that is for the process that generates.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.version = f"torch {torch.__version__}"
        self._bundle = None if job["bundle"] is None else Path(job["bundle"])
        self._deltas: dict[int, LoraDelta] = {}
        update = None
        if self._bundle is not None:
            bundle = Bundle.load(self._bundle, None)
            update = bundle.spec, bundle.bases
        self._engine = build_engine(Path(job["model"]), engine_config(job), update)

    @property
    def stats(self) -> EngineStats:
        """The engine's counts."""
        return self._engine.stats

    def prepare(self, load: Workload) -> None:
        """Generate the updates that `load` uses."""
        asked = {one.cluster for one in load.requests if one.cluster is not None}
        if missing := asked - self._deltas.keys():
            assert self._bundle is not None
            self._deltas.update(generated(Bundle.load(self._bundle, None), missing))
            give_back()  # what generating has left is not the engine's

    def add(self, index: int, request: Request, output_tokens: int) -> None:
        """See SteppedEngine."""
        delta = None if request.cluster is None else self._deltas[request.cluster]
        key: AdapterKey | None = None if delta is None else delta.key
        sampling = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
        self._engine.add(
            TokenizedRequest(
                str(index), tuple(request.prompt), sampling, Assignment(key, request.cluster)
            ),
            delta,
        )

    def step(self) -> Iterator[Arrival]:
        """See SteppedEngine."""
        for chunk in self._engine.step():
            yield Arrival(int(chunk.request_id), chunk.tokens, chunk.finish_reason is not None)

    def run(self, load: Workload) -> list[Trace]:
        """See HostedEngine."""
        return drive(self, load)

    def close(self) -> None:
        """Nothing is left running."""


def generated(bundle: Bundle, clusters: set[int]) -> Iterator[tuple[int, LoraDelta]]:
    """The update of each of a bundle's clusters."""
    generator, snapshot = AdapterGenerator(bundle), bundle.snapshot
    for cluster in sorted(clusters):
        row = snapshot.row(cluster)
        assert row is not None, f"the bundle has no cluster {cluster}"
        delta = generator.generate(bundle.key(snapshot, row), snapshot.conditioning_of(row))
        yield cluster, delta


def engine_config(job: dict[str, Any]) -> EngineConfig:
    """Settings for the job's concurrency, with what `--set` changes."""
    settings = {
        "device": job["device"],
        "max_sequences": job["max_concurrency"],
        "max_context": job["max_context"],
        "cpu_threads": job["threads"],
        **job["settings"],
    }
    return EngineConfig(**settings)


start = ChameleonEngine
