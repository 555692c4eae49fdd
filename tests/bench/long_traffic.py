"""Long and mixed traffic on the engine alone: stalls, shared beginnings, a KV cache too small.

    python tests/bench/long_traffic.py --out runs/long_traffic

- stalls: streams are running, and prompts of up to the model's context arrive among them. Time
  between the streams' tokens, with bounded prompt chunks and without.
- prefixes: chats of several clusters with one system prompt, one after the other. Time to first
  token with and without the prefix cache.
- pressure: more running requests than the KV cache holds. Speed beside a cache that holds all, and
  whether every answer is the same.

Writes long_traffic.json and long_traffic.md to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serving_bench import prepare
from serving_bench.engines.chameleon import ChameleonEngine
from serving_bench.machine import describe_machine
from serving_bench.texts import find_text
from serving_bench.workload import Request, Workload

from lm_workers.device import pick_device
from lm_workers.models import DEFAULT_MODEL, load_tokenizer, resolve_dtype, resolve_model

CLUSTERS = 4
Figures = dict[str, float | int | bool | str]


@dataclass(frozen=True)
class Job:
    """A request of `output` greedy tokens that is sent before step `at`."""

    request: Request
    output: int
    at: int = 0


@dataclass
class Answer:
    """When it was sent, and when which tokens came, in seconds."""

    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def replay(engine: ChameleonEngine, jobs: Sequence[Job]) -> list[Answer]:
    """Send every job at its step; the answers are in the order of the jobs.

    The clock goes on where there is nothing to do until the next job, too, but no step is counted.
    """
    engine.prepare(Workload([job.request for job in jobs], 1, 1))
    waiting = sorted(range(len(jobs)), key=lambda i: jobs[i].at)
    answers: dict[int, Answer] = {}
    running, step = 0, 0
    while waiting or running:
        while waiting and (jobs[waiting[0]].at <= step or not running):
            index = waiting.pop(0)
            answers[index] = Answer(time.perf_counter())
            engine.add(index, jobs[index].request, jobs[index].output)
            running += 1
        arrivals = list(engine.step())
        now, step = time.perf_counter(), step + 1
        for arrival in arrivals:
            if arrival.tokens:
                answers[arrival.index].times.append(now)
                answers[arrival.index].tokens += arrival.tokens
            running -= arrival.finished
    return [answers[index] for index in range(len(jobs))]


class Texts:
    """Prompts cut from a text, one after the other."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens
        self._at = 0

    def cut(self, length: int) -> list[int]:
        """The next `length` tokens, from the beginning again where the text ends."""
        found = [self._tokens[(self._at + i) % len(self._tokens)] for i in range(length)]
        self._at += length
        return found


@dataclass(frozen=True)
class Lab:
    """Makes engines that differ in their settings."""

    model: Path
    bundle: Path
    device: str
    threads: int
    dtype: str

    def engine(self, **settings: Any) -> ChameleonEngine:
        """An engine with `settings`, which has run a request."""
        engine = ChameleonEngine(
            {
                "model": str(self.model),
                "bundle": str(self.bundle),
                "device": self.device,
                "threads": self.threads,
                "max_concurrency": 32,
                "max_context": None,
                "settings": {"dtype": self.dtype, **settings},
            }
        )
        replay(engine, [Job(Request([5] * 40, 0), 4)])
        return engine


def stalls(lab: Lab, texts: Texts, args: argparse.Namespace) -> Iterator[Figures]:
    """Gaps between tokens of running streams while long prompts arrive."""
    streams = [Job(Request(texts.cut(32), i % CLUSTERS), args.tokens) for i in range(args.streams)]
    every = max(1, args.tokens // (len(args.long) + 1))
    long = [
        Job(Request(texts.cut(length), i % CLUSTERS), 8, (i + 1) * every)
        for i, length in enumerate(args.long)
    ]
    unbounded = max(args.long) + args.streams
    whole = {"prefill_chunk": unbounded, "max_batch_tokens": unbounded}
    variants: list[tuple[str, dict[str, Any]]] = [("default", {})]
    variants += [(f"chunks of {chunk}", {"prefill_chunk": chunk}) for chunk in args.chunks]
    variants += [("whole", whole)] if args.whole else []
    for name, settings in variants:
        engine = lab.engine(prefix_cache=False, **settings)
        alone = gaps(replay(engine, streams))
        answers = replay(engine, [*streams, *long])
        mixed = gaps(answers[: len(streams)])
        first = [answer.times[0] - answer.sent for answer in answers[len(streams) :]]
        yield {
            "prompts": name,
            "alone_p50_ms": percentile(alone, 50),
            "p50_ms": percentile(mixed, 50),
            "p99_ms": percentile(mixed, 99),
            "max_ms": max(mixed),
            "p99_over_p50": percentile(mixed, 99) / percentile(mixed, 50),
            "long_first_token_s": max(first),
        }


def gaps(answers: Iterable[Answer]) -> list[float]:
    """Milliseconds between arrivals, all answers together."""
    return [1e3 * float(gap) for answer in answers for gap in np.diff(answer.times)]


def percentile(values: Sequence[float], share: float) -> float:
    """The `share`-th percentile."""
    return float(np.percentile(values, share))


def prefixes(lab: Lab, texts: Texts, args: argparse.Namespace) -> Iterator[Figures]:
    """Chats with one system prompt, one after the other."""
    system = texts.cut(args.system)
    chats = [Job(Request(system + texts.cut(32), i % CLUSTERS), 16) for i in range(args.chats)]
    spent: dict[str, float] = defaultdict(float)
    for name, cache in (("off", False), ("on", True)):
        engine = lab.engine(prefix_cache=cache)
        first = []
        for chat in chats:
            [answer] = replay(engine, [chat])
            first.append(1e3 * (answer.times[0] - answer.sent))
            spent[name] += answer.times[-1] - answer.sent
        later = first[CLUSTERS:]
        yield {
            "prefix_cache": name,
            "first_token_ms": statistics.median(later),
            "first_token_p95_ms": percentile(later, 95),
            "cached": engine.stats.hit_rate,
            "tokens_per_s": len(chats) * 16 / spent[name],
        }


def pressure(lab: Lab, texts: Texts, args: argparse.Namespace) -> Iterator[Figures]:
    """More running requests than the KV cache holds."""
    jobs = [
        Job(Request(texts.cut(96), i % CLUSTERS), args.pressure_tokens) for i in range(args.crowd)
    ]
    needed = args.crowd * (96 + args.pressure_tokens)
    expected: list[list[int]] = []
    for share in (1.25, 0.5, 0.25):
        size = int(share * needed)
        # float32, so that an answer depends on nothing but its own prompt.
        engine = lab.engine(
            kv_cache_tokens=size,
            max_context=needed // args.crowd,
            prefix_cache=False,
            dtype="float32",
        )
        began = time.perf_counter()
        found = [answer.tokens for answer in replay(engine, jobs)]
        seconds = time.perf_counter() - began
        expected = expected or found
        yield {
            "kv_cache": f"{share:.0%} of what all need at once",
            "preemptions": engine.stats.preemptions,
            "tokens_per_s": sum(map(len, found)) / seconds,
            "same_answers": found == expected,
        }


SCENARIOS = {"stalls": stalls, "prefixes": prefixes, "pressure": pressure}


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# Long and mixed traffic\n",
        f"- command: `{report['command']}`",
        f"- machine: {report['machine']}",
        f"- model: {report['model']}, depth full, {CLUSTERS} clusters; text: {report['text']}",
    ]
    for name, rows in report["tables"].items():
        header = list(rows[0])
        lines += [
            f"\n## {name}\n",
            f"| {' | '.join(header)} |",
            f"|{' --- |' * len(header)}",
            *(f"| {' | '.join(map(_cell, row.values()))} |" for row in rows),
        ]
    return "\n".join(lines) + "\n"


def _cell(value: float | int | bool | str) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL)
    add("--streams", type=int, default=8)
    add("--tokens", type=int, default=400, help="of each running stream")
    add("--long", type=int, nargs="*", default=[2000, 500, 6000, 1000], help="prompts that arrive")
    add("--chunks", type=int, nargs="*", default=[], help="other settings of prefill_chunk to try")
    add("--no-whole", dest="whole", action="store_false", help="leave out prompts read whole")
    add("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    add("--system", type=int, default=512, help="tokens of the system prompt")
    add("--chats", type=int, default=24)
    add("--crowd", type=int, default=16, help="requests that do not fit in the KV cache")
    add("--pressure-tokens", type=int, default=64)
    add("--device", default="cpu")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--text", type=Path, help="file that prompts are cut from")
    add("--out", type=Path, default=Path("runs/long_traffic"))
    args = parser.parse_args()
    device = pick_device(args.device)
    model = resolve_model(args.model)
    text, source = find_text(args.text)
    texts = Texts(load_tokenizer(model)(text, add_special_tokens=False).input_ids)
    machine = describe_machine(device, args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        prepare.write_bundle(model, bundle, "full", 16, CLUSTERS)
        dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
        lab = Lab(model, bundle, device, args.threads, dtype)
        tables = {name: list(SCENARIOS[name](lab, texts, args)) for name in args.scenarios}
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "model": args.model,
        "text": source,
        "tables": tables,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "long_traffic.json").write_text(json.dumps(report, indent=1))
    (args.out / "long_traffic.md").write_text(markdown(report))
    print(markdown(report))
    if not all(row["same_answers"] for row in tables.get("pressure", [])):
        sys.exit("a preempted request was answered otherwise")


if __name__ == "__main__":
    main()
