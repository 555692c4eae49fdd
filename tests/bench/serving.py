"""Serving speed: our engine, the whole service, and what people would use instead.

    python tests/bench/serving.py --engine chameleon transformers peft vllm \
        --python-vllm vllm-env/bin/python --out runs/serving

Every engine runs the same prompts in a process of its own; runs alternate between the engines.
Writes serving.json, serving.md and serving.png to `--out`, with each engine's output beside them.
An engine that cannot be started is left out, and the report says so. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from serving_bench import prepare
from serving_bench.machine import describe_machine
from serving_bench.plot import plot
from serving_bench.process import EngineProcess
from serving_bench.report import choose_reference, markdown, summarise
from serving_bench.schedule import Bench, order
from serving_bench.texts import find_text
from serving_bench.variants import ENGINES, Inputs, Variant, environment, interpreter, variants
from serving_bench.workload import Workload, make_workload

from lm_workers.device import pick_device
from lm_workers.models import DEFAULT_MODEL, load_tokenizer, resolve_dtype, resolve_model

WARM_UP = -1  # the repeat of what comes in no measured run
QUICK = {"requests": 16, "output_tokens": 16, "repeats": 1, "clusters": [4], "concurrency": [8]}


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--engine", nargs="+", choices=ENGINES[:-1], default=["chameleon"])
    add("--serve", action="store_true", help="also the whole service over HTTP streams")
    add("--adaptation", choices=["on", "off", "both"], default="both")
    add("--clusters", nargs="+", type=int, default=[1, 4, 16, 64])
    add("--concurrency", nargs="+", type=int, default=[16, 32])
    add("--repeats", type=int, default=3)
    add("--requests", type=int, default=64, help="at least; more where clusters are more")
    add("--prompt-tokens", type=int, default=64, help="mean")
    add("--output-tokens", type=int, default=64)
    add("--peer-clusters", type=int, default=64, help="most adapters that peers are given")
    add("--reference", help="row that others are compared with, such as 'vllm off'")
    add("--model", default=DEFAULT_MODEL)
    add("--depth", choices=["full", "head"], default="full")
    add("--rank", type=int, default=16)
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of our engine")
    add("--text", type=Path, help="file that prompts are cut from")
    add("--device", default="cpu")
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--python-vllm", help="interpreter of an environment with vllm")
    add("--python-peft", help="interpreter of an environment with transformers and peft")
    add("--timeout", type=float, default=1800, help="seconds for one start or run")
    add("--quick", action="store_true", help="a run of a minute or two, of no use as a figure")
    add("--out", type=Path, default=Path("runs/serving"))
    if parser.parse_args(words).quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(words)
    if args.serve:
        args.engine.append("served")
    return args


def engine_settings(words: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` words as EngineConfig fields; values are YAML."""
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


def make_inputs(args: argparse.Namespace, chosen: list[Variant], scratch: Path) -> Inputs:
    """Write what the engines are built from."""
    device = pick_device(args.device)
    model = resolve_model(args.model)
    bundle = adapters = None
    if any(one.adapted and one.engine in ("chameleon", "served") for one in chosen):
        bundle = scratch / "bundle"
        prepare.write_bundle(model, bundle, args.depth, args.rank, max(args.clusters))
    counts = [count for count in args.clusters if count <= args.peer_clusters]
    if counts and any(one.adapted and one.engine in ("peft", "vllm") for one in chosen):
        adapters = scratch / "adapters"
        prepare.write_loras(model, adapters, max(counts))
    dtype = resolve_dtype(args.dtype, device)
    if any(one.engine in ("chameleon", "served") for one in chosen):
        prepare.start_once(model, dtype, device)
    dtype_name = str(dtype).removeprefix("torch.")
    longest = args.prompt_tokens + args.prompt_tokens // 4 + args.output_tokens
    return Inputs(
        model=model,
        bundle=bundle,
        adapters=adapters,
        adapter_rank=prepare.LORA_RANK,
        device=device,
        dtype=dtype_name,
        threads=args.threads,
        max_concurrency=max(args.concurrency),
        max_context=max(512, longest),
        settings={"dtype": dtype_name, **engine_settings(args.set)},
    )


def start(args: argparse.Namespace, inputs: Inputs, variant: Variant) -> EngineProcess:
    """The process of a variant."""
    peft = args.python_peft
    named = {"vllm": args.python_vllm, "peft": peft, "transformers": peft}
    python = interpreter(variant.engine, named)
    return EngineProcess(
        variant.engine,
        python,
        inputs.job(variant.adapted),
        args.out / f"{variant.name.replace(' ', '-')}.log",
        environment(variant.engine, python, args.threads),
        args.timeout,
    )


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything that was asked for, as a report."""
    chosen = variants(args.engine, args.adaptation)
    inputs = make_inputs(args, chosen, scratch)
    machine = describe_machine(inputs.device, args.threads)
    text, source = find_text(args.text)
    tokens = load_tokenizer(inputs.model)(text, add_special_tokens=False).input_ids
    load = partial(
        make_workload,
        tokens,
        requests=args.requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
    )

    def warm_up(variant: Variant) -> Workload:
        one = load(min(args.clusters) if variant.adapted else None, inputs.max_concurrency, WARM_UP)
        return Workload(one.requests[: 2 * one.concurrency], 16, one.concurrency)

    bench = Bench(partial(start, args, inputs), load, warm_up, partial(print, flush=True))
    bench.run(order(chosen, args.clusters, args.concurrency, args.repeats, args.peer_clusters))
    reference = choose_reference(bench.runs, args.reference)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "model": args.model,
        "text": source,
        "settings": {**inputs.settings, "depth": args.depth, "rank": args.rank},
        "started": bench.started,
        "left_out": bench.left_out,
        "reference": reference,
        "summary": summarise(bench.runs, reference),
        "runs": [one.dump() for one in bench.runs],
    }


def main() -> None:
    """Run, print and write the report."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        report = run(args, Path(scratch))
    (args.out / "serving.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "serving.md").write_text(markdown(report))
    print(markdown(report))
    if report["summary"] and not plot(report["summary"], args.out / "serving.png"):
        print("matplotlib is not installed: no plot; install the `bench` extra")


if __name__ == "__main__":
    main()
