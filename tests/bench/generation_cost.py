"""What a cluster's update costs: to generate it, to hold it, and to fine-tune it instead.

    OMP_NUM_THREADS=2 python tests/bench/generation_cost.py --out runs/generation_cost
    python tests/bench/generation_cost.py --device cuda --data ../shared/data

One run on one device measures both sides: for the shipped bundle, and for core hypernetworks of
random weights at depth `full` and `head` (what they cost does not depend on their weights). How
the fine-tuning is done is told in `cluster_finetune.py`. Text comes from `--data` (as `python -m
training train` takes it), from `--text` (files, each one document), or else from the modules of
Python's standard library. Writes generation_cost.json and .md to `--out`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cluster_finetune as finetune
import numpy as np
import torch
from transformers import PreTrainedModel

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.generator import AdapterGenerator
from adapter_gen.hypernetwork import CoreConfig
from adapter_gen.sites import discover_sites
from adapter_gen.update import Depth
from cluster_router.embedding import TokenEmbedder
from cluster_router.wire.errors import ConfigError
from deploy.config import SHIPPED
from lm_workers.models import (
    DEFAULT_MODEL,
    auto_dtype,
    fingerprint,
    load_causal_lm,
    load_embedding,
    load_tokenizer,
    resolve_model,
)
from training.clusters import assign, embed_contexts
from training.config import DataSettings
from training.data import Document, Window, WindowCutter, open_reader, read_documents

CONTEXT, SCORED = 128, 256  # as the shipped bundle was trained
READ_CHARACTERS = 8000  # of each file; a window takes no more
LIMIT_MS = {"cpu": 20.0, "cuda": 5.0}
LIMIT_BYTES = 108 * 1024
LIMIT_RATIO = 100


@dataclass(frozen=True)
class Generation:
    """Milliseconds to generate one update, as `AdapterGenerator.generate` returns it: checked,
    float16, in host memory. `first_ms` is the first of all, before anything is warm."""

    runs: int
    first_ms: float
    median_ms: float
    p5_ms: float
    p95_ms: float
    bytes: int


def time_generation(bundle: Bundle, device: str, runs: int) -> Generation:
    """Generate updates of one cluster after another."""
    generator, snapshot = AdapterGenerator(bundle, device=device), bundle.snapshot
    took, size = [], 0
    for run in range(runs + 1):
        row = run % len(snapshot)
        key, conditioning = bundle.key(snapshot, row), snapshot.conditioning_of(row)
        started = time.perf_counter()
        delta = generator.generate(key, conditioning)
        took.append(1000 * (time.perf_counter() - started))
        size = delta.nbytes
    first, warm = took[0], np.array(took[1:])
    low, median, high = (float(np.percentile(warm, p)) for p in (5, 50, 95))
    return Generation(runs, first, median, low, high, size)


def core_bundle(shipped: Bundle, model: PreTrainedModel, depth: Depth, rank: int) -> Bundle:
    """A core hypernetwork with random weights, over the shipped bundle's clusters."""
    spec = discover_sites(model, depth, rank)
    hypernetwork = CoreConfig().build(spec, shipped.hypernetwork.conditioning_dim)
    for factor in (hypernetwork.cores, hypernetwork.shift):
        torch.nn.init.normal_(factor.weight, std=0.02)
    return replace(shipped, hypernetwork=hypernetwork, bases=init_bases(spec, seed=0))


def documents(args: argparse.Namespace) -> Iterator[Document]:
    """The text that clusters are looked for in."""
    if args.data is not None:
        reader = open_reader(args.data, DataSettings(), args.out / "cache")
        for domain in reader.domains():
            yield from read_documents(reader, domain, "train", args.documents)
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in args.text or sorted(library.glob("*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")[:READ_CHARACTERS]
        if text.strip():
            yield Document(text, file.stem)


def support(bundle: Bundle, path: Path, args: argparse.Namespace) -> tuple[int, list[Window]]:
    """The cluster that most documents belong to, and up to `--support` of them.

    Raises:
        ConfigError: no cluster has the eight documents that it takes to train and to stop.
    """
    cutter = WindowCutter(load_tokenizer(path), CONTEXT, SCORED)
    windows = [window for window in map(cutter.cut, documents(args)) if window is not None]
    embedder = TokenEmbedder(load_embedding(path), bundle.token_weights)
    rows = assign(embed_contexts(windows, embedder), bundle.snapshot)
    counts = np.bincount(rows[rows >= 0], minlength=len(bundle.snapshot))
    row = int(counts.argmax())
    members = [window for window, its in zip(windows, rows, strict=True) if its == row]
    if len(members) < 8:
        raise ConfigError(f"no cluster has more than {len(members)} documents; give more text")
    return int(bundle.snapshot.ids[row]), members[: args.support]


def both_costs(bundle: Bundle, tuned: finetune.Cost, args: argparse.Namespace) -> dict[str, Any]:
    """Both costs of one kind of update, and whether they keep within the limits."""
    generation = time_generation(bundle, args.device, args.runs)
    ratio = 1000 * tuned.seconds / generation.median_ms
    return {
        "rank": bundle.spec.rank,
        "sites": len(bundle.spec.sites),
        "numbers": bundle.spec.numbers_per_cluster,
        "generation": asdict(generation),
        "finetune": asdict(tuned),
        "ratio": ratio,
        "ratio_at_p95": 1000 * tuned.seconds / generation.p95_ms,
        "within": {
            "time": generation.median_ms <= LIMIT_MS[torch.device(args.device).type],
            "bytes": generation.bytes <= LIMIT_BYTES,
            "ratio": ratio >= LIMIT_RATIO,
        },
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything; generation is timed right after its fine-tuning."""
    torch.manual_seed(args.seed)
    path = resolve_model(DEFAULT_MODEL)
    shipped = Bundle.load(SHIPPED / DEFAULT_MODEL, fingerprint(path))
    cluster, members = support(shipped, path, args)
    model = load_causal_lm(path, auto_dtype(args.device), args.device)
    split = finetune.Support.of(members)
    tuned = finetune.tune_full(model, shipped.spec, split, args.full_steps)
    kinds = {"shipped, full": both_costs(shipped, tuned, args)}
    core = core_bundle(shipped, model, "full", shipped.spec.rank)
    kinds["core, full"] = both_costs(core, tuned, args)
    core = core_bundle(shipped, model, "head", args.head_rank)
    tuned = finetune.tune_head(model, core, split, args.head_steps)
    kinds["core, head"] = both_costs(core, tuned, args)
    return {
        "environment": environment(args, model),
        "cluster": {
            "id": cluster,
            "documents": len(split.train),
            "held_out": len(split.held_out),
            "tokens": sum(len(window.tokens) for window in split.train),
        },
        "kinds": kinds,
    }


def environment(args: argparse.Namespace, model: PreTrainedModel) -> dict[str, Any]:
    """Where the figures come from."""
    cuda = torch.device(args.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": DEFAULT_MODEL,
        "finetune_dtype": str(model.dtype).removeprefix("torch."),
        "seed": args.seed,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    where, cluster = report["environment"], report["cluster"]
    lines = [
        "# Cost of a cluster's update\n",
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, {where['model']}; "
        f"cluster {cluster['id']}: {cluster['documents']} documents, {cluster['tokens']} tokens.\n",
        "| hypernetwork, depth | sites x rank | bytes | generate: median (p5 to p95; first), ms "
        "| fine-tune, s | ratio (at p95) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    kinds = report["kinds"]
    for kind, row in kinds.items():
        gen = row["generation"]
        lines.append(
            f"| {kind} | {row['sites']} x {row['rank']} | {gen['bytes']:,} "
            f"| {gen['median_ms']:.2f} ({gen['p5_ms']:.2f} to {gen['p95_ms']:.2f}; "
            f"{gen['first_ms']:.2f}) | {row['finetune']['seconds']:.2f} "
            f"| {row['ratio']:,.0f} ({row['ratio_at_p95']:,.0f}) |"
        )
    lines += ["", *(f"- {kind}: {row['finetune']['how']}" for kind, row in kinds.items())]
    for kind, row in kinds.items():
        missed = [name for name, kept in row["within"].items() if not kept]
        lines.append(f"- {kind}, limits not kept: {', '.join(missed) or 'none'}")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help="text by domain, as training reads it")
    source.add_argument("--text", type=Path, nargs="+", help="files, each one document")
    parser.add_argument("--out", type=Path, default=Path("runs/generation_cost"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=200, help="updates generated of each kind")
    parser.add_argument("--documents", type=int, default=200, help="of each domain of --data")
    parser.add_argument("--support", type=int, default=64, help="documents of the cluster at most")
    parser.add_argument("--head-rank", type=int, default=32, help="of the head depth")
    parser.add_argument("--head-steps", type=int, default=300, help="most steps at depth head")
    parser.add_argument("--full-steps", type=int, default=3, help="steps timed; 0: all of them")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Run, print and write the report."""
    args = arguments()
    report = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "generation_cost.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "generation_cost.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
