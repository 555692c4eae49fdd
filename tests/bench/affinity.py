"""Request routers for LM replicas, beside each other: update loads, balance, time to first token.

    python tests/bench/affinity.py --out runs/affinity

Real Serve deployments and the real routers around a stub of a replica: it holds so many updates,
waits where a replica would load one or run a step, and computes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from cachetools import LRUCache
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster_router.affinity import AffinityPolicy
from deploy.affinity import router_config, routing_stats

CONSISTENT_HASH = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
CROWDING = 0.1
"""Each request that runs beside it makes a step longer by this share."""


@dataclass(frozen=True)
class Costs:
    """What the stub takes. Seconds; `held` is how many updates a replica holds."""

    held: int
    load_s: float
    step_s: float
    steps: int


class Updates:
    """A replica's updates: misses on one share a load, as in lm_workers/worker.py."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._loading: dict[str, asyncio.Task[None]] = {}
        self.held: LRUCache[str, bool] = LRUCache(costs.held)
        self.loads = 0

    async def get(self, key: str) -> None:
        """Return once `key` is held."""
        if self.held.pop(key, False):
            self.held[key] = True
            return
        if key not in self._loading:
            self._loading[key] = asyncio.create_task(self._load(key))
        await asyncio.shield(self._loading[key])

    async def _load(self, key: str) -> None:
        self.loads += 1
        await asyncio.sleep(self._costs.load_s)
        self.held[key] = True
        del self._loading[key]


class Stub:
    """A replica that waits instead of computing. `updates` None: the class below has them."""

    def __init__(self, costs: Costs) -> None:
        self._costs, self._running = costs, 0
        self._updates = Updates(costs)

    async def record_routing_stats(self) -> dict[str, list[str]]:
        return routing_stats(self._updates.held)

    async def generate(self, key: str) -> AsyncIterator[tuple[str, int]]:
        """One item a step: this replica's id, and how many updates it has loaded."""
        self._running += 1
        try:
            await self._get(key)
            for _ in range(self._costs.steps):
                await asyncio.sleep(self._costs.step_s * (1 + CROWDING * self._running))
                yield serve.get_replica_context().replica_id.unique_id, self._loads()
        finally:
            self._running -= 1

    async def _get(self, key: str) -> None:
        await self._updates.get(key)

    def _loads(self) -> int:
        return self._updates.loads


def multiplexed(costs: Costs) -> type[Stub]:
    """The stub with its updates kept by `serve.multiplexed`."""

    class Multiplexed(Stub):
        count = 0

        @serve.multiplexed(max_num_models_per_replica=costs.held)
        async def model(self, key: str) -> str:
            self.count += 1
            await asyncio.sleep(costs.load_s)
            return key

        async def _get(self, key: str) -> None:
            await self.model(key)

        def _loads(self) -> int:
            return self.count

    return Multiplexed


@dataclass(frozen=True)
class Variant:
    """A way to route: the replica's class, its router, and the handle option that carries a key."""

    stub: Callable[[Costs], type[Stub]]
    router: RequestRouterConfig | None
    option: str | None


def variants() -> dict[str, Variant]:
    """What is compared, by the name it has in the report."""

    def plain(_: Costs) -> type[Stub]:
        return Stub

    hashing = RequestRouterConfig(request_router_class=CONSISTENT_HASH)
    return {
        "power of two (default)": Variant(plain, None, None),
        "serve.multiplexed": Variant(multiplexed, None, "multiplexed_model_id"),
        "ConsistentHashRouter": Variant(plain, hashing, "session_id"),
        "cluster affinity": Variant(plain, router_config(AffinityPolicy()), "session_id"),
    }


@dataclass
class Measured:
    """One run. `requests` by replica, most first; times to first token in ms."""

    loads: int
    requests: list[int]
    p50: float
    p99: float


async def send(handle: Any, keys: list[str], option: str | None, clients: int) -> Measured:
    """Clients that send their next request when their last has ended."""
    waiting, firsts = iter(keys), []
    served: Counter[str] = Counter()
    loads: dict[str, int] = {}

    async def client() -> None:
        for key in waiting:
            began, first = time.perf_counter(), 0.0
            async for replica, loaded in handle.options(
                stream=True, **({option: key} if option else {})
            ).generate.remote(key):
                first = first or time.perf_counter() - began
                loads[replica] = max(loaded, loads.get(replica, 0))
            firsts.append(1000 * first)
            served[replica] += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    p50, p99 = (float(one) for one in np.percentile(firsts, [50, 99]))
    return Measured(sum(loads.values()), sorted(served.values(), reverse=True), p50, p99)


def measure(variant: Variant, keys: list[str], args: argparse.Namespace) -> Measured:
    """One run on replicas that hold nothing yet."""
    costs = Costs(args.held, args.load_ms / 1000, args.step_ms / 1000, args.steps)
    deployment = serve.deployment(variant.stub(costs)).options(
        name="Stub",
        num_replicas=args.replicas,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.05},
        graceful_shutdown_wait_loop_s=0.1,
        **({"request_router_config": variant.router} if variant.router else {}),
    )
    # A process keeps the router it first had for a name, so each run has a name of its own.
    app = f"bench-{uuid.uuid4().hex[:8]}"
    handle = serve.run(deployment.bind(costs), name=app, route_prefix=None)
    try:
        return asyncio.run(send(handle, keys, variant.option, args.clients))
    finally:
        serve.delete(app)


def zipf(args: argparse.Namespace, seed: int) -> list[str]:
    """Cluster ids, in proportion to 1 / rank."""
    weights = [1 / place for place in range(1, args.clusters + 1)]
    ids = [f"cluster-{place}" for place in range(args.clusters)]
    return random.Random(seed).choices(ids, weights, k=args.requests)


def table(found: dict[str, list[Measured]], args: argparse.Namespace) -> str:
    """Medians over the repeats; requests per replica of each."""
    rows = [
        f"| router | update loads (ideal {args.clusters}) | requests per replica "
        "| largest share / fair | first token p50 / p99 ms |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        shares = [args.replicas * one.requests[0] / args.requests for one in runs]
        rows.append(
            f"| {name} | {statistics.median(one.loads for one in runs):g} "
            f"| {', '.join('/'.join(map(str, one.requests)) for one in runs)} "
            f"| {statistics.median(shares):.2f} (max {max(shares):.2f}) "
            f"| {statistics.median(one.p50 for one in runs):.0f} "
            f"/ {statistics.median(one.p99 for one in runs):.0f} |"
        )
    return "\n".join(rows) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--clusters", type=int, default=24)
    parser.add_argument("--requests", type=int, default=300, help="of one run")
    parser.add_argument("--clients", type=int, default=18)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--held", type=int, default=10, help="updates a replica holds")
    parser.add_argument("--load-ms", type=float, default=60, help="generating and loading one")
    parser.add_argument("--step-ms", type=float, default=25, help="one step of an idle replica")
    parser.add_argument("--steps", type=int, default=12, help="of one request")
    parser.add_argument("--out", type=Path, default=Path("runs/affinity"))
    return parser.parse_args()


def main() -> None:
    """Measure all variants in turn, `--repeats` times, and write the report."""
    args = arguments()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    found: dict[str, list[Measured]] = {name: [] for name in variants()}
    try:
        serve.start(proxy_location="Disabled")
        for repeat in range(args.repeats):
            keys = zipf(args, repeat)
            for name, variant in variants().items():
                found[name].append(measure(variant, keys, args))
                print(f"{repeat} {name}: {found[name][-1]}", flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "settings": {name: str(value) for name, value in vars(args).items()},
        "ray": ray.__version__,
        "runs": {name: [asdict(one) for one in runs] for name, runs in found.items()},
    }
    (args.out / "affinity.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "affinity.md").write_text(table(found, args))
    print(table(found, args))


if __name__ == "__main__":
    main()
