"""The built-in engine and vLLM behind the same worker, on one small workload.

    python tests/bench/second_engine.py --out runs/second_engine      # needs vLLM, takes minutes

Prompts are the beginnings of the documents of tests/serve, updates those of the shipped bundle's
clusters. Each engine runs alone, in a process of its own: unadapted, and with the requests spread
over 1 and 4 clusters. Writes second_engine.json to `--out`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from adapter_gen.bundle import Bundle
from adapter_gen.generator import AdapterGenerator
from cluster_router.wire.types import Assignment, SamplingParams, TokenizedRequest
from deploy.config import SHIPPED
from lm_workers.build import build_engine
from lm_workers.config import EngineConfig
from lm_workers.models import DEFAULT_MODEL, load_tokenizer, resolve_model
from lm_workers.vllm.config import VllmConfig
from lm_workers.worker import LMWorker

TEXTS = sorted((Path(__file__).parents[1] / "serve" / "documents").glob("*.txt"))
BACKENDS: dict[str, Callable[..., Any]] = {"built-in": EngineConfig, "vllm": VllmConfig}
CLUSTERS = (0, 1, 4)
"""How many a run's requests are spread over; 0 is unadapted."""


def assignments(bundle: Bundle, clusters: int) -> list[Assignment]:
    """What requests run under, in turn."""
    if not clusters:
        return [Assignment(key=None)]
    snapshot = bundle.snapshot
    return [
        Assignment(bundle.key(snapshot, row), row, conditioning=snapshot.conditioning_of(row))
        for row in range(clusters)
    ]


def prompts(
    texts: Sequence[tuple[int, ...]], count: int, fresh: Iterator[int]
) -> list[tuple[int, ...]]:
    """The beginnings of `texts` in turn, each after the next of `fresh`.

    A token in front that no prompt of the engine has had keeps the prefix cache out of it.
    """
    return [(next(fresh), *texts[number % len(texts)])[:64] for number in range(count)]


async def run(worker: LMWorker, requests: list[TokenizedRequest], at_once: int) -> float:
    """Output tokens a second."""
    waiting, begun = iter(requests), time.perf_counter()

    async def client() -> int:
        count = 0
        for request in waiting:
            async for chunk in worker.generate(request):
                count += len(chunk.tokens)
        return count

    counts = await asyncio.gather(*(client() for _ in range(at_once)))
    return sum(counts) / (time.perf_counter() - begun)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One engine's figures."""
    path, bundle = resolve_model(DEFAULT_MODEL), Bundle.load(SHIPPED / DEFAULT_MODEL, None)
    tokenizer = load_tokenizer(path)
    texts = [tuple(tokenizer(file.read_text(encoding="utf-8")).input_ids) for file in TEXTS]
    settings = {"dtype": args.dtype, "max_context": 512, "max_sequences": args.at_once}
    config = BACKENDS[args.backend](**settings, **yaml.safe_load(args.settings))
    begun = time.perf_counter()
    engine = build_engine(path, config, (bundle.spec, bundle.bases))
    worker = LMWorker(engine, AdapterGenerator(bundle), bundle.spec, patience_s=60)
    found: dict[str, Any] = {"start_s": time.perf_counter() - begun, "tokens_per_s": {}}
    sampling = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    fresh = itertools.count(100)
    for clusters in CLUSTERS:
        assigned = assignments(bundle, clusters)
        rates = []
        for repeat in range(args.repeats + 1):  # the first is a warm-up
            requests = [
                TokenizedRequest(
                    f"{repeat}-{number}", prompt, sampling, assigned[number % len(assigned)]
                )
                for number, prompt in enumerate(prompts(texts, args.requests, fresh))
            ]
            rates.append(await run(worker, requests, args.at_once))
        found["tokens_per_s"][clusters] = rates[1:]
        print(f"{args.backend}, {clusters} clusters: {_summary(rates[1:])}", flush=True)
    worker.close()
    return found


def _summary(rates: list[float]) -> str:
    return f"{statistics.median(rates):.1f} tokens/s ({min(rates):.1f}-{max(rates):.1f})"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=sorted(BACKENDS), help="only this one")
    parser.add_argument("--settings", default="{}", help="more settings of --backend, as YAML")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--output", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/second_engine"))
    return parser.parse_args()


def main() -> None:
    """Run one engine, or this program once for each."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.backend is None:
        for backend in BACKENDS:
            command = [sys.executable, *sys.argv, "--backend", backend]
            subprocess.run(command, check=True)
        return
    file = args.out / "second_engine.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    rows[args.backend] = asyncio.run(measure(args))
    file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
