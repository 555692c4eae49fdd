"""Decoding speed of the engine on a GPU, against what the memory bandwidth allows.

    python tests/bench/gpu_decode.py --out runs/gpu_decode
    python tests/bench/gpu_decode.py --device cpu --shapes tiny --batches 1 4

Models have random weights; nothing is downloaded. On a GPU it also decodes without CUDA graphs, to
compare; `--set cuda_graphs=false` leaves them out everywhere, `--set kernels=reference` measures
plain torch. `--parts profile` writes the time of each kernel to profile-SHAPE-*.txt. Writes
gpu_decode.json and gpu_decode.md to `--out`, anew after every part. Without a CUDA device it says
so and ends with status 2, unless `--device cpu`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from serving_bench.decode import ShapeBench
from serving_bench.machine import describe_machine
from serving_bench.random_models import SHAPES

PARTS = {
    "decode": "decode steps alone",
    "serve": "whole requests, prefill included",
    "profile": "time of each kernel",
}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--device", default="cuda")
    add("--shapes", nargs="+", choices=list(SHAPES), default=["smollm2-135m", "llama-8b"])
    add("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    add("--clusters", nargs="+", type=int, default=[1, 16, 64, 1000])
    add("--steps", type=int, default=64, help="measured decode steps in one run")
    add("--repeats", type=int, default=3)
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the engine")
    add("--scratch", type=Path, help="folder with room for a model (16 GB for llama-8b)")
    add("--parts", nargs="+", choices=list(PARTS), default=["decode", "serve"])
    add("--out", type=Path, default=Path("runs/gpu_decode"))
    return parser.parse_args(words)


def clusters_name(clusters: int | str | None) -> str:
    """As the tables call it."""
    return "off" if clusters is None else str(clusters)


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    machine = report["machine"]
    lines = ["# Decode bench\n", f"- command: `{report['command']}`", f"- machine: {machine}\n"]
    lines += [
        f"- {shape}: a copy reached {bandwidth:.0f} GB/s beside these figures"
        for shape, bandwidth in report["bandwidth_gb_per_s"].items()
    ]
    lines += [
        "\n## Decode steps alone\n",
        "| shape | batch | clusters in it | tokens/s | step ms (min-max) | limit ms | of the limit "
        "| over unadapted |\n| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['shape']} | {row['batch']} | {clusters_name(row['clusters'])} "
        f"| {row['tokens_per_s']:.0f} | {row['step_ms']:.3f} "
        f"({row['step_ms_low']:.3f}-{row['step_ms_high']:.3f}) | {row['limit_ms']:.3f} "
        f"| {row['of_limit']:.0%} | {row['over_unadapted']:+.1%} |"
        for row in report["decode"]
    ]
    lines += [
        "\nThe limit is the bytes of all weights and of the batch's keys and values, over the "
        "bandwidth.\n\n## Whole requests, prefill included\n",
        "| shape | at a time | clusters | tokens/s (min-max) | of unadapted |\n"
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['shape']} | {row['concurrency']} | {clusters_name(row['clusters'])} "
        f"| {row['tokens_per_s']:.0f} ({row['low']:.0f}-{row['high']:.0f}) "
        f"| {row['of_unadapted']:.1%} |"
        for row in report["serve"]
    ]
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All shapes, one after another."""
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(args.device, len(os.sched_getaffinity(0))),
        "bandwidth_gb_per_s": {},
        "decode": [],
        "serve": [],
    }
    for shape in args.shapes:
        say(f"{shape}: making the model and its engines")
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            bench = ShapeBench(shape, args, Path(scratch))
        report["bandwidth_gb_per_s"][shape] = bench.bandwidth
        for part in args.parts:
            say(f"{shape}: {PARTS[part]}")
            if part == "profile":
                for name, text in bench.profile().items():
                    (args.out / f"profile-{shape}-{name}.txt").write_text(text)
            else:
                report[part] += bench.decode() if part == "decode" else bench.serve()
            write(report, args.out)
        del bench
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return report


def say(what: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def write(report: dict[str, Any], out: Path) -> None:
    """The files."""
    (out / "gpu_decode.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu_decode.md").write_text(markdown(report))


def main() -> None:
    """Run, print and write the report."""
    args = arguments()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device here: nothing was measured")
        sys.exit(2)
    args.out.mkdir(parents=True, exist_ok=True)
    print(markdown(run(args)))


if __name__ == "__main__":
    main()
