"""Replicas that follow the load: a calm, a burst of callers, a calm, and who was running when.

    python tests/bench/autoscaling.py --out runs/autoscaling

The real application under Serve's own autoscaler and the policy of `deploy/autoscaling.py`: LM
replicas by the tokens ahead of them, generators by updates that are waited for, routers by their
requests. The model has two layers of random numbers, so that replicas can start on a few cores
while the load is on; every request names a cluster at random, so that updates have to be generated
all the time. Ends with status 1 where a request failed, or a deployment did not go up and back
down.
"""

from __future__ import annotations

import reliability.environment  # noqa: F401  # before Ray

# isort: split
import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ray
import torch
from ray import serve
from reliability.bundles import write_bundle
from reliability.load import Load, counted, quantile
from reliability.report import table
from reliability.service import APP, free_port
from serving_bench.random_models import write_random_model

from deploy.app import build
from deploy.config import AppConfig

SAMPLE_S = 1.0
SCALED = ("ClusterRouter", "LMReplica", "AdapterGenerator")
_PACE = {
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 2,
    "downscale_delay_s": 10,
}


def policy(**targets: float) -> dict[str, Any]:
    """The section of a config for `LoadPolicy`."""
    return {
        "policy_function": "deploy.autoscaling:LoadPolicy",
        "policy_kwargs": {"targets": targets},
    }


def scaling(most: int, tokens: int) -> dict[str, dict[str, Any]]:
    """Autoscaling of each deployment, up to `most` replicas."""
    bounds = {"min_replicas": 1, "max_replicas": most, **_PACE}
    return {
        "ClusterRouter": bounds | {"target_ongoing_requests": 8},
        "LMReplica": bounds | {"policy": policy(tokens=8 * tokens)},
        "AdapterGenerator": bounds | {"policy": policy(misses=0.25)},
    }


@contextmanager
def running(folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """The URL of the application, whose parts start with one replica each."""
    model, bundle, port = folder / "model", folder / "bundle", free_port()
    write_random_model("tiny", model, torch.float32, "cpu")
    write_bundle(model, bundle, 0, clusters=args.clusters, width=args.width)
    config = AppConfig.model_validate(
        {
            "model": str(model),
            "bundle": str(bundle),
            "engine": {
                "dtype": "float32",
                "kernels": "reference",
                "cpu_threads": 1,
                "max_context": 256,
                "max_sequences": 8,
                "max_queued": 256,
            },
            "generator": {"patience_s": 60, "cache_bytes": 4096},
            "learner": {"enabled": False},
        }
    )
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        router = build(config)
        lm = router._bound_deployment.init_args[1]
        generator = lm._bound_deployment.init_args[1]
        wanted = scaling(args.most, args.tokens)
        for part in (router, lm, generator):
            own = part._bound_deployment
            part._bound_deployment = own.options(
                num_replicas="auto", autoscaling_config=wanted[own.name]
            )
        serve.run(router, name=APP)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def replicas() -> dict[str, int]:
    """How many of each deployment are running."""
    deployments = serve.status().applications[APP].deployments
    return {name: int(deployments[name].replica_states.get("RUNNING", 0)) for name in SCALED}


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(0)
    async with httpx.AsyncClient(base_url=url) as http:
        [model] = (await http.get("/v1/models")).json()["data"]

    def make() -> dict[str, Any]:
        return {
            "model": model["id"],
            "prompt": "a load that comes and goes",
            "max_tokens": args.tokens,
            "ignore_eos": True,
            "adaptation": draw.randrange(args.clusters),
        }

    begun = time.monotonic()
    samples: list[dict[str, float]] = []

    async def watch() -> None:
        while True:
            found = await asyncio.to_thread(replicas)
            samples.append({"second": round(time.monotonic() - begun, 1), **found})
            await asyncio.sleep(SAMPLE_S)

    watcher = asyncio.create_task(watch())
    rows = []
    phases = (("calm", 1, args.calm), ("burst", args.callers, args.burst), ("calm", 1, args.calm))
    for name, callers, seconds in phases:
        load, since = Load(url, make, callers), time.monotonic() - begun
        async with load.running():
            await asyncio.sleep(seconds)
        until = time.monotonic() - begun
        within = [one for one in samples if since <= one["second"] <= until]
        took = [one.took for one in load.outcomes if one.kind == "done"]
        failures = Counter(one.detail for one in load.outcomes if one.kind != "done")
        rows.append(
            {
                "phase": name,
                "seconds": round(until - since),
                "callers": callers,
                "requests": len(load.outcomes),
                **counted(load.outcomes),
                "p50 s": round(quantile(took, 0.5), 2),
                **{f"most {part}": max(int(one[part]) for one in within) for part in SCALED},
                **{f"{part} at its end": int(within[-1][part]) for part in SCALED},
                "failures": dict(failures),
            }
        )
    watcher.cancel()
    return {"phases": rows, "samples": samples}


def draw_plot(found: dict[str, Any], path: Path) -> None:
    """Replicas over time, the burst shaded."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3))
    for part in SCALED:
        points = [(one["second"], one[part]) for one in found["samples"]]
        axes.step(*zip(*points, strict=True), where="post", label=part)
    before, burst, _ = (row["seconds"] for row in found["phases"])
    axes.axvspan(before, before + burst, color="0.92", label="burst")
    axes.set_xlabel("seconds")
    axes.set_ylabel("replicas running")
    axes.set_ylim(0)
    axes.legend(ncols=4, loc="upper center", fontsize="small")
    figure.savefig(path, bbox_inches="tight")


def followed(found: dict[str, Any]) -> bool:
    """Whether every request succeeded, and every deployment went up and back down."""
    calm, burst, after = found["phases"]
    whole = all(row["requests"] == row.get("done", 0) for row in found["phases"])
    up = all(burst[f"most {part}"] > calm[f"most {part}"] for part in SCALED)
    return whole and up and all(after[f"{part} at its end"] == 1 for part in SCALED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calm", type=float, default=45, help="seconds before and after the burst")
    parser.add_argument("--burst", type=float, default=75, help="its seconds")
    parser.add_argument("--callers", type=int, default=24, help="of the burst")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--most", type=int, default=2, help="replicas of each deployment")
    parser.add_argument("--clusters", type=int, default=2000)
    parser.add_argument("--width", type=int, default=4096, help="of the hypernetwork: its cost")
    parser.add_argument("--out", type=Path, default=Path("runs/autoscaling"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), args) as url:
        found = asyncio.run(measure(url, args))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(found, indent=1))
    (args.out / "report.md").write_text(table(found["phases"]))
    draw_plot(found, args.out / "replicas.svg")
    print(table(found["phases"]))
    if not followed(found):
        sys.exit("a request failed, or a deployment did not go up and back down")


if __name__ == "__main__":
    main()
