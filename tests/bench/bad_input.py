"""Bad input by the hundred thousand: no 5xx, no hang, nothing left behind.

    python tests/bench/bad_input.py --count 100000 --out runs/bad-input

The application as it is served, but for Ray, with a real engine around a model of two layers. One
in twenty inputs is made by schemathesis from /openapi.json, the rest by `reliability/inputs.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from reliability.asgi import fault, send
from reliability.inputs import JSON, MODEL, Input, Inputs
from reliability.load import quantile
from reliability.tiny import tiny_service
from schemathesis.core import NotSet

from lm_workers.worker import LMWorker

AT_ONCE = 16
HANG_S = 60.0
BLOCK = 50
"""Inputs that one run of hypothesis makes of one operation."""


def from_schema(app: FastAPI, count: int, seed: int) -> Iterator[Input]:
    """Inputs made from the application's own description, most of them against it."""
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(app.openapi())))
    operations = [one.ok() for one in schema.get_all_operations()]
    made = 0
    for number in range(10**6):
        operation = operations[number % len(operations)]
        mode = list(schemathesis.GenerationMode)[number // len(operations) % 3 != 0]
        for case in _cases(operation.as_strategy(generation_mode=mode), seed + number):
            yield _input(case)
            made += 1
            if made == count:
                return


def _cases(strategy: Any, seed: int) -> list[Any]:
    found: list[Any] = []

    @seeded(seed)
    @settings(
        max_examples=BLOCK,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Any) -> None:
        found.append(case)

    # What takes neither parameters nor a body cannot be asked for wrongly.
    with suppress(Unsatisfiable):
        collect()
    return found


def _input(case: Any) -> Input:
    path = quote(case.formatted_path, safe="/%", errors="replace")
    if case.query:
        path += "?" + urlencode(case.query, doseq=True, errors="replace")
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL  # or nearly all would stop at that
    headers = tuple((str(name), str(value)) for name, value in (case.headers or {}).items())
    if isinstance(case.body, NotSet):
        return Input(case.method.upper(), path, (), headers, "schema")
    body = (
        case.body if isinstance(case.body, bytes) else json.dumps(case.body, default=str).encode()
    )
    return Input(case.method.upper(), path, (body,), (*JSON, *headers), "schema")


async def run(app: FastAPI, worker: LMWorker, inputs: Iterator[Input]) -> dict[str, Any]:
    """Send them all, `AT_ONCE` at a time."""
    faults: list[str] = []
    statuses: Counter[str] = Counter()
    took: list[float] = []

    async def caller(block: Iterator[Input]) -> None:
        for one in block:
            begun = time.perf_counter()
            try:
                answer = await send(app, one, HANG_S)
                found = fault(one, answer)
                statuses[f"{one.kind}: {answer.status}"] += 1
            except Exception as error:
                found = repr(error)
            took.append(time.perf_counter() - begun)
            if found is not None:
                faults.append(f"{found}: {one.method} {one.path} {one.headers} {one.parts}"[:2000])

    while block := list(islice(inputs, BLOCK)):  # made before the clock starts
        rest = iter(block)
        await asyncio.gather(*(caller(rest) for _ in range(AT_ONCE)))
    stats = await worker.check_integrity()
    assert (stats.running, stats.waiting, stats.kv_free) == (0, 0, 1.0), stats
    return {
        "inputs": len(took),
        "faults": faults,
        "statuses": dict(sorted(statuses.items())),
        "p50_ms": round(1000 * quantile(took, 0.5), 2),
        "p99_ms": round(1000 * quantile(took, 0.99), 2),
        "longest_ms": round(1000 * max(took), 2),
    }


def mixed(app: FastAPI, count: int, seed: int, share: float) -> Iterator[Input]:
    """`count` inputs, of which `share` come from the schema."""
    from_own = count - int(share * count)
    yield from islice(Inputs(seed), from_own)
    if count > from_own:
        yield from from_schema(app, count - from_own, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schema-share", type=float, default=0.05)
    parser.add_argument("--out", type=Path, default=Path("runs/bad-input"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        tiny_service(Path(folder) / "tiny") as (app, worker),
    ):
        inputs = mixed(app, args.count, args.seed, args.schema_share)
        found = asyncio.run(run(app, worker, inputs))
    found["seconds"] = round(time.monotonic() - begun, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(found, indent=1))
    print(json.dumps({**found, "faults": found["faults"][:10]}, indent=1))
    raise SystemExit(bool(found["faults"]))


if __name__ == "__main__":
    main()
