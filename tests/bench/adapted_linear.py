"""What an update costs on one linear layer, in the engine's form and in others'.

    python tests/bench/adapted_linear.py --out runs/adapted_linear

The engine's form applies each row's small core between bases that all clusters share. The others
keep plain LoRA factors for every cluster: gathered row by row, as columns of all clusters with
those of other clusters masked, or one cluster after another. All stand on the same base product
and are timed in turn. Writes adapted_linear.json and adapted_linear.md to `--out`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from serving_bench.machine import describe_machine, synchronise
from serving_bench.workload import zipf_clusters
from torch import nn

from adapter_gen.apply import adapted_linear, init_bases
from adapter_gen.update import HEAD, LoraDelta, SharedBases, Site, UpdateSpec
from cluster_router.wire.types import AdapterKey
from lm_workers.adapters import AdapterBank, RowSlots
from lm_workers.device import pick_device
from lm_workers.layers.choose import choose_kernels, choose_layout
from lm_workers.layers.linear import LinearGroup, RowUpdate
from lm_workers.models import resolve_dtype

Layer = Callable[[torch.Tensor], torch.Tensor]
BASE = "base product"


class Case:
    """One layer with updates of `clusters` clusters, in every form.

    Args:
        args: the command line.
        clusters: updates resident.
    """

    def __init__(self, args: argparse.Namespace, clusters: int) -> None:
        torch.manual_seed(0)
        self._args, self.clusters = args, clusters
        self._device = pick_device(args.device)
        self._dtype = resolve_dtype("auto", self._device)
        self._inner = nn.Linear(args.in_features, args.out_features, bias=False)
        self._inner.to(self._device, self._dtype).requires_grad_(False)
        self._layout = choose_layout("auto", self._dtype, self._device)
        self._spec = UpdateSpec(
            "full",
            args.rank,
            args.in_features,
            (
                Site("layer", args.in_features, args.out_features),
                Site(HEAD, args.in_features, args.in_features),
            ),
        )
        self._bases = init_bases(self._spec, seed=0)
        self._bank = AdapterBank(self._spec, self._bases, clusters, self._dtype, self._device)
        self.slots_of = [self._bank.acquire(self._delta(cluster)) for cluster in range(clusters)]
        self._a = self._random(clusters + 1, args.lora_rank, args.in_features)
        self._b = self._random(clusters + 1, args.out_features, args.lora_rank)

    def _random(self, *shape: int) -> torch.Tensor:
        return 0.05 * torch.randn(shape, dtype=self._dtype, device=self._device)

    def _delta(self, cluster: int) -> LoraDelta:
        rank = self._args.rank
        rng = np.random.default_rng(cluster)
        cores = (0.5 * rng.standard_normal((2, rank, rank))).astype(np.float16)
        shift = np.zeros(self._args.in_features, np.float16)
        return LoraDelta(AdapterKey("bench", "bench", cluster, 0), cores=cores, shift=shift)

    def input(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random x [rows, in], and the slot of each row: all clusters, or as many as rows."""
        if rows >= self.clusters:
            drawn = zipf_clusters(rows, self.clusters, seed=0)
        else:
            drawn = random.Random(0).sample(range(self.clusters), rows)
        slots = torch.tensor([self.slots_of[cluster] for cluster in drawn], device=self._device)
        return 20 * self._random(rows, self._args.in_features), slots

    def forms(self, slots: torch.Tensor) -> dict[str, Layer]:
        """Every form of the layer for rows of `slots`."""
        base = LinearGroup([self._inner], self._layout, None)
        forms: dict[str, Layer] = {BASE: base, "cores (the engine)": self._cores(slots)}
        if self.clusters <= self._args.most_columns:
            forms["LoRA, all clusters' columns"] = self._columns(base, slots)
        forms["LoRA, gathered by row"] = self._gathered(base, slots)
        forms["LoRA, cluster by cluster"] = self._one_by_one(base, slots)
        return forms

    def _cores(self, slots: torch.Tensor) -> Layer:
        rows = RowSlots()
        rows.tokens = slots
        kernels = choose_kernels("auto", self._dtype, self._device)
        targets = self._bank.targets([(0, 0, self._args.out_features)])
        update = RowUpdate(self._bank, rows, kernels, targets)
        return LinearGroup([self._inner], self._layout, update)

    def _gathered(self, base: Layer, slots: torch.Tensor) -> Layer:
        def forward(x: torch.Tensor) -> torch.Tensor:
            low = torch.bmm(self._a[slots], x[:, :, None])
            return base(x) + torch.bmm(self._b[slots], low)[:, :, 0]

        return forward

    def _columns(self, base: Layer, slots: torch.Tensor) -> Layer:
        rank = self._args.lora_rank
        down = self._a.flatten(0, 1)  # [K * r, in]
        up = self._b.transpose(1, 2).flatten(0, 1).T.contiguous()  # [out, K * r]
        owners = torch.arange(len(self._a), device=self._device).repeat_interleave(rank)
        mine = (owners == slots[:, None]).to(self._dtype)

        def forward(x: torch.Tensor) -> torch.Tensor:
            return base(x) + F.linear(F.linear(x, down) * mine, up)

        return forward

    def _one_by_one(self, base: Layer, slots: torch.Tensor) -> Layer:
        groups = [(s, (slots == s).nonzero()[:, 0]) for s in slots.unique().tolist()]

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = base(x).clone()
            for slot, rows in groups:
                y[rows] += F.linear(F.linear(x[rows], self._a[slot]), self._b[slot])
            return y

        return forward

    @torch.inference_mode()
    def check(self, x: torch.Tensor, slots: torch.Tensor) -> float:
        """Largest difference of the engine's form from the definition, over the largest output."""
        bases: SharedBases = self._bases
        place = {slot: cluster for cluster, slot in enumerate(self.slots_of)}
        deltas = [self._delta(place[slot]).cores for slot in slots.tolist()]
        cores = torch.from_numpy(np.stack([one[0] for one in deltas if one is not None])).float()
        x32, weight = x.float().cpu(), self._inner.weight.float().cpu()
        expected = adapted_linear(x32, x32 @ weight.T, bases.u[0], bases.v[0], cores)
        found = self._cores(slots)(x).float().cpu()
        return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def time_in_turn(
    forms: dict[str, Layer], x: torch.Tensor, device: str, repeats: int, slice_s: float
) -> dict[str, list[float]]:
    """Microseconds of a call, `repeats` times for each form, the forms in turn."""
    counts = {}
    for name, form in forms.items():
        form(x)
        counts[name] = max(1, round(slice_s / _seconds(form, x, device, 3)))
    found: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            found[name].append(1e6 * _seconds(form, x, device, counts[name]))
    return found


def _seconds(form: Layer, x: torch.Tensor, device: str, count: int) -> float:
    synchronise(device)
    began = time.perf_counter()
    for _ in range(count):
        form(x)
    synchronise(device)
    return (time.perf_counter() - began) / count


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of clusters, number of rows and form."""
    found = []
    for clusters in args.clusters:
        case = Case(args, clusters)
        for rows in args.rows:
            x, slots = case.input(rows)
            error = case.check(x, slots)
            if not error < 0.05:
                sys.exit(f"the engine's layer is off by {error:.1%}: its speed means nothing")
            forms = case.forms(slots)
            times = time_in_turn(forms, x, pick_device(args.device), args.repeats, args.slice)
            base = statistics.median(times[BASE])
            found += [
                {
                    "clusters": clusters,
                    "rows": rows,
                    "form": name,
                    "us": statistics.median(values),
                    "low": min(values),
                    "high": max(values),
                    "times_base": statistics.median(values) / base,
                }
                for name, values in times.items()
            ]
    return found


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "# One adapted linear layer\n",
        f"- command: `{report['command']}`",
        f"- machine: {report['machine']}\n",
        "| clusters | rows | form | us (min-max) | x base |\n| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['clusters']} | {row['rows']} | {row['form']} "
        f"| {row['us']:.1f} ({row['low']:.1f}-{row['high']:.1f}) | {row['times_base']:.2f} |"
        for row in report["rows"]
    ]
    return "\n".join(lines) + "\n"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--in-features", type=int, default=576)
    add("--out-features", type=int, default=1536)
    add("--rank", type=int, default=16, help="of the cores")
    add("--lora-rank", type=int, default=8)
    add("--rows", nargs="+", type=int, default=[1, 16, 32, 256])
    add("--clusters", nargs="+", type=int, default=[1, 16, 64, 1000])
    add("--most-columns", type=int, default=64, help="most clusters for the form with all columns")
    add("--repeats", type=int, default=7)
    add("--slice", type=float, default=0.05, help="seconds that one form is timed in one turn")
    add("--device", default="cpu")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--out", type=Path, default=Path("runs/adapted_linear"))
    return parser.parse_args(words)


def main() -> None:
    """Run, print and write the report."""
    args = arguments()
    machine = describe_machine(pick_device(args.device), args.threads)
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine,
        "rows": measure(args),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "adapted_linear.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "adapted_linear.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
