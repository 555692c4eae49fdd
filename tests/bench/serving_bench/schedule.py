"""Which run comes after which, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from serving_bench.measure import RunFigures, run_figures
from serving_bench.process import EngineProcess, EngineProcessError
from serving_bench.variants import Variant
from serving_bench.workload import Workload

MakeLoad = Callable[[int | None, int, int], Workload]
"""(clusters, concurrency, repeat) -> workload."""


@dataclass(frozen=True)
class Cell:
    """One run: who, with how many clusters, how many at a time, which repeat."""

    variant: Variant
    clusters: int | None
    concurrency: int
    repeat: int


@dataclass
class Run:
    """A cell and its outcome."""

    cell: Cell
    figures: RunFigures
    peak_mb: float
    tokens: list[tuple[int, ...]] = field(repr=False)

    def dump(self) -> dict[str, Any]:
        """For the JSON report; the tokens themselves are left out."""
        return {
            "engine": self.cell.variant.engine,
            "adapted": self.cell.variant.adapted,
            "clusters": self.cell.clusters,
            "concurrency": self.cell.concurrency,
            "repeat": self.cell.repeat,
            "peak_mb": round(self.peak_mb),
            **asdict(self.figures),
        }


def order(
    variants: list[Variant],
    clusters: list[int],
    concurrencies: list[int],
    repeats: int,
    peer_clusters: int,
) -> Iterator[Cell]:
    """Every run. All variants have their turn before any has its next: A B C, A B C, A B C.

    Peers, which keep every adapter as weights of its own, are spared more than `peer_clusters`.
    """
    for concurrency in concurrencies:
        for repeat in range(repeats):
            for variant in variants:
                if not variant.adapted:
                    yield Cell(variant, None, concurrency, repeat)
            for count in clusters:
                for variant in variants:
                    ours = variant.engine in ("chameleon", "served")
                    if variant.adapted and (ours or count <= peer_clusters):
                        yield Cell(variant, count, concurrency, repeat)


class Bench:
    """Runs cells, each variant in a process that lives from its first run to the end.

    Args:
        start: starts a variant's process, or raises EngineProcessError.
        make_load: workload of a cell.
        warm_up: workload that every process runs first, unmeasured.
        say: told what happens.
    """

    def __init__(
        self,
        start: Callable[[Variant], EngineProcess],
        make_load: MakeLoad,
        warm_up: Callable[[Variant], Workload],
        say: Callable[[str], None] = print,
    ) -> None:
        self._start, self._make_load, self._warm_up, self._say = start, make_load, warm_up, say
        self._processes: dict[Variant, EngineProcess] = {}
        self.runs: list[Run] = []
        self.started: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}

    def run(self, cells: Iterator[Cell]) -> None:
        """Run all cells; a variant that fails is left out from then on."""
        try:
            for cell in cells:
                if cell.variant.name not in self.left_out:
                    self._run(cell)
        finally:
            for process in self._processes.values():
                process.close()

    def _run(self, cell: Cell) -> None:
        label = f"{cell.variant.row(cell.clusters)}, {cell.concurrency} at a time"
        try:
            process = self._process(cell.variant)
            load = self._make_load(cell.clusters, cell.concurrency, cell.repeat)
            traces, peak = process.run(load)
            figures = run_figures(traces)
            expected = len(load.requests) * load.output_tokens
            if figures.output_tokens != expected:
                raise EngineProcessError(
                    f"{figures.output_tokens} tokens came, {expected} were asked"
                )
        except (EngineProcessError, ValueError) as failure:
            self.left_out[cell.variant.name] = str(failure)
            self._say(f"{cell.variant.name} is left out: {failure}")
            return
        tokens = [tuple(trace.tokens) for trace in traces]
        self.runs.append(Run(cell, figures, peak, tokens))
        self._say(f"{label}, run {cell.repeat + 1}: {figures.tokens_per_s:.1f} tokens/s")

    def _process(self, variant: Variant) -> EngineProcess:
        if variant not in self._processes:
            process = self._start(variant)
            self._processes[variant] = process
            self.started[variant.name] = {
                "version": process.version,
                "start_s": round(process.start_s, 1),
                "ready_mb": round(process.ready_mb),
            }
            self._say(f"{variant.name} is ready after {process.start_s:.0f} s")
            process.run(self._warm_up(variant))
        return self._processes[variant]
