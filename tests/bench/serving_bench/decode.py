"""Decoding and serving of one model shape, without and with updates."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from serving_bench.engines.chameleon import ChameleonEngine
from serving_bench.machine import copy_bandwidth
from serving_bench.measure import run_figures
from serving_bench.prepare import write_bundle
from serving_bench.random_models import model_config, streamed_bytes, write_random_model
from serving_bench.workload import Request, Workload, make_workload

from lm_workers.models import resolve_dtype

PROMPT = 64
SETTLE = 16  # steps after the last prefill that are not measured
RANK = 16
NO_GRAPHS = "off, no CUDA graphs"


def prompts(vocab_size: int, count: int, seed: int) -> list[list[int]]:
    """Random prompts."""
    rng = random.Random(seed)
    return [[rng.randrange(2, vocab_size) for _ in range(PROMPT)] for _ in range(count)]


def decode_seconds(
    engine: ChameleonEngine, requests: Sequence[Request], steps: int, output_tokens: int
) -> float:
    """Median seconds of `steps` steps in which every request gets one token."""
    for index, request in enumerate(requests):
        engine.add(index, request, output_tokens)
    made, seconds, left = [0] * len(requests), [], len(requests)
    while left:
        measured = min(made) >= SETTLE and len(seconds) < steps
        began = time.perf_counter()
        for arrival in list(engine.step()):
            made[arrival.index] += len(arrival.tokens)
            left -= arrival.finished
        if measured:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


class ShapeBench:
    """One shape: engines without and with updates, all resident, measured in turn.

    On a GPU there is one more, without updates, that runs without CUDA graphs; unless --set says
    whether to use them.

    Args:
        shape: a name in `SHAPES`.
        args: the command line of gpu_decode.py.
        scratch: empty folder for the model.
    """

    def __init__(self, shape: str, args: argparse.Namespace, scratch: Path) -> None:
        self._shape, self._args = shape, args
        self._dtype = resolve_dtype("auto", args.device)
        model = write_random_model(shape, scratch / "model", self._dtype, args.device)
        write_bundle(model, scratch / "bundle", "full", RANK, max(args.clusters))
        self._vocab_size = model_config(shape).vocab_size
        self._engines = {
            adapted: ChameleonEngine(self._job(model, scratch / "bundle" if adapted else None))
            for adapted in (False, True)
        }
        self._without_graphs: ChameleonEngine | None = None
        if args.device.startswith("cuda") and not any("cuda_graphs" in word for word in args.set):
            job = self._job(model, None)
            job["settings"]["cuda_graphs"] = False
            self._without_graphs = ChameleonEngine(job)
        self.bandwidth = copy_bandwidth(args.device)

    def _job(self, model: Path, bundle: Path | None) -> dict[str, Any]:
        settings = (word.partition("=") for word in self._args.set)
        return {
            "model": str(model),
            "bundle": None if bundle is None else str(bundle),
            "device": self._args.device,
            "threads": torch.get_num_threads(),
            "max_concurrency": max(self._args.batches),
            "max_context": 512,
            "settings": {
                "kv_cache_tokens": 1024 * max(self._args.batches),
                **{key: yaml.safe_load(value) for key, _, value in settings},
            },
        }

    def decode(self) -> list[dict[str, Any]]:
        """A row for each batch size: unadapted, then with as many clusters as fit in the batch."""
        rows = []
        for batch in self._args.batches:
            counts = sorted({min(count, batch) for count in self._args.clusters})
            names: list[int | str | None] = [None, *counts]
            if self._without_graphs is not None:
                names.append(NO_GRAPHS)
            found: dict[int | str | None, list[float]] = {name: [] for name in names}
            for repeat in range(self._args.repeats):
                for name, seconds in found.items():
                    seconds.append(self._decode_once(batch, name, repeat))
            base = statistics.median(found[None])
            rows += [self._row(batch, name, seconds, base) for name, seconds in found.items()]
        return rows

    def _engine(self, clusters: int | str | None) -> ChameleonEngine:
        if clusters == NO_GRAPHS:
            assert self._without_graphs is not None
            return self._without_graphs
        return self._engines[clusters is not None]

    def _decode_once(self, batch: int, clusters: int | str | None, repeat: int) -> float:
        texts = prompts(self._vocab_size, batch, repeat)
        requests = [
            Request(text, place % clusters if isinstance(clusters, int) else None)
            for place, text in enumerate(texts)
        ]
        engine = self._engine(clusters)
        steps = self._args.steps
        # A prompt in a later step than another ends later: the batch must still be whole.
        output_tokens = steps + SETTLE + batch + 1
        engine.prepare(Workload(requests, output_tokens, batch))
        return decode_seconds(engine, requests, steps, output_tokens)

    def profile(self) -> dict[str, str]:
        """Time on the device by kernel, for each batch size: unadapted, and a cluster for each row.

        Prefill is in it too.
        """
        tables = {}
        for batch in self._args.batches:
            for name, clusters in (("off", None), ("on", batch)):
                self._decode_once(batch, clusters, 0)  # records what it will repeat
                with torch.profiler.profile() as found:
                    self._decode_once(batch, clusters, 1)
                order = "self_device_time_total"
                tables[f"{batch}-{name}"] = found.key_averages().table(order, row_limit=40)
        return tables

    def _row(
        self, batch: int, clusters: int | str | None, seconds: list[float], base: float
    ) -> dict[str, Any]:
        context = PROMPT + SETTLE + self._args.steps // 2
        limit = streamed_bytes(self._shape, self._dtype, batch, context) / self.bandwidth / 1e9
        step = statistics.median(seconds)
        return {
            "shape": self._shape,
            "batch": batch,
            "clusters": clusters,
            "tokens_per_s": batch / step,
            "step_ms": 1000 * step,
            "step_ms_low": 1000 * min(seconds),
            "step_ms_high": 1000 * max(seconds),
            "limit_ms": 1000 * limit,
            "of_limit": limit / step,
            "over_unadapted": step / base - 1,
        }

    def serve(self) -> list[dict[str, Any]]:
        """Whole requests, prefill included, at the largest batch: more clusters than slots too."""
        batch = max(self._args.batches)
        text = [token for one in prompts(self._vocab_size, 400, seed=-1) for token in one]
        speeds: dict[int | None, list[float]] = {None: [], **{c: [] for c in self._args.clusters}}

        def speed(clusters: int | None, repeat: int) -> float:
            load = make_workload(text, clusters, batch, repeat, requests=4 * batch)
            engine = self._engines[clusters is not None]
            engine.prepare(load)
            return run_figures(engine.run(load)).tokens_per_s

        for clusters in (None, min(self._args.clusters)):
            speed(clusters, -1)  # records what others repeat
        for repeat in range(self._args.repeats):
            for clusters, found in speeds.items():
                found.append(speed(clusters, repeat))
        base = statistics.median(speeds[None])
        return [
            {
                "shape": self._shape,
                "concurrency": batch,
                "clusters": clusters,
                "tokens_per_s": statistics.median(found),
                "low": min(found),
                "high": max(found),
                "of_unadapted": statistics.median(found) / base,
            }
            for clusters, found in speeds.items()
        ]
