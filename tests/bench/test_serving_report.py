"""The figures, what is compared with what, and what the report says of engines that failed."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from serving_bench.measure import agreement, paired_ratio, percentile, run_figures
from serving_bench.plot import plot
from serving_bench.process import EngineProcessError
from serving_bench.report import markdown, summarise
from serving_bench.schedule import Bench, order
from serving_bench.variants import Variant, interpreter, variants
from serving_bench.workload import Request, Trace, Workload


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(0).exponential(size=101).tolist()
    for share in (0, 0.5, 0.95, 0.99, 1):
        assert percentile(values, share) == pytest.approx(np.quantile(values, share))
    assert percentile([3.0], 0.99) == 3.0


def test_figures_of_a_run() -> None:
    figures = run_figures([Trace(0.0, [0.5, 0.6, 0.8], 3), Trace(1.0, [1.25, 1.5, 2.0], 3)])
    assert figures.tokens_per_s == 6 / 2.0
    assert figures.first_ms.p50 == pytest.approx((500 + 250) / 2)
    assert figures.queued_first_s.p50 == pytest.approx((0.5 + 1.25) / 2)
    assert figures.between_ms.p50 == pytest.approx((200 + 250) / 2)
    with pytest.raises(ValueError, match="without output"):
        run_figures([Trace(0.0, [])])


def test_ratios_pair_the_same_repeats() -> None:
    ratio = paired_ratio({0: 20.0, 1: 5.0, 2: 9.0}, {0: 10.0, 1: 5.0, 3: 1.0})
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == (1.5, 1.0, 2.0)
    assert paired_ratio({0: 1.0}, {1: 1.0}) is None


def test_agreement_counts_up_to_the_first_difference() -> None:
    assert agreement([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert agreement([[1, 2], [1, 2]], [[1, 2], [3, 2]]) == 0.5
    assert agreement([[]], [[1]]) is None


def test_engines_take_turns() -> None:
    chosen = variants(["chameleon", "transformers", "peft"], "both")
    assert [v.name for v in chosen] == [
        "chameleon off",
        "chameleon on",
        "transformers off",
        "peft on",
    ]
    cells = [(c.variant.row(c.clusters), c.repeat) for c in order(chosen, [1, 1000], [16], 2, 64)]
    turn = ["chameleon off", "transformers off", "chameleon on, K=1", "peft on, K=1"]
    turn.append("chameleon on, K=1000")  # too many for PEFT
    assert cells == [(name, 0) for name in turn] + [(name, 1) for name in turn]


def test_an_environment_named_from_here_is_found_from_anywhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").mkdir()
    (tmp_path / "env/python").symlink_to(sys.executable)
    assert interpreter("vllm", {"vllm": "env/python"}) == str(tmp_path / "env/python")
    assert interpreter("peft", {"vllm": "env/python", "peft": None}) == sys.executable
    assert interpreter("vllm", {"vllm": "none/python"}) == "none/python"


class FakeProcess:
    """An engine of a given speed that tells how often it ran; `broken` fails at a run."""

    version, start_s, ready_mb = "1", 0.5, 100.0

    def __init__(self, name: str, speed: float, broken: bool) -> None:
        self.name, self.speed, self.broken = name, speed, broken

    def run(self, load: Workload) -> tuple[list[Trace], float]:
        count = load.output_tokens
        if self.broken and len(load.requests) > 1:
            raise EngineProcessError("out of memory")
        times = [(place + 1) / self.speed for place in range(count)]
        return [Trace(0.0, times, count, tuple(range(count))) for _ in load.requests], 250.0

    def close(self) -> None:
        pass


def run_bench(speeds: dict[str, float], broken: str = "", missing: str = "") -> Bench:
    def start(variant: Variant) -> FakeProcess:
        if variant.engine == missing:
            raise EngineProcessError("ModuleNotFoundError: No module named 'vllm'")
        return FakeProcess(variant.name, speeds[variant.name], variant.engine == broken)

    def load(clusters: int | None, concurrency: int, repeat: int) -> Workload:
        return Workload([Request([1], clusters)] * 2, 4, concurrency)

    bench = Bench(
        start, load, lambda variant: Workload([Request([1], None)], 4, 1), say=lambda text: None
    )  # type: ignore[arg-type]
    engines = list(dict.fromkeys(name.split()[0] for name in speeds))
    bench.run(order(variants(engines, "both"), [4, 16], [16], 2, 64))
    return bench


def report_of(bench: Bench, reference: str) -> dict:
    return {
        "command": "python tests/bench/serving.py",
        "machine": {"cpu": "test"},
        "model": "tiny",
        "text": "a text",
        "started": bench.started,
        "left_out": bench.left_out,
        "reference": reference,
        "summary": summarise(bench.runs, reference),
        "runs": [run.dump() for run in bench.runs],
    }


SPEEDS = {"chameleon off": 50.0, "chameleon on": 40.0, "vllm off": 25.0, "vllm on": 10.0}


def test_summary_compares_with_the_reference() -> None:
    report = report_of(run_bench(SPEEDS), "vllm off")
    rows = {row["row"]: row for row in report["summary"]}
    assert rows["chameleon on, K=16"]["times_reference"]["median"] == pytest.approx(1.6)
    assert rows["chameleon off"]["tokens_per_s"]["median"] == pytest.approx(100)
    assert rows["chameleon off"]["same_answers"] == 1.0
    assert rows["chameleon on, K=4"]["same_answers"] is None
    assert rows["chameleon on, K=4"]["runs"] == 2
    text = markdown(report)
    assert "| chameleon on, K=16 | 80 (80-80) | 1.60 (1.60-1.60) |" in text
    json.dumps(report)


def test_plot(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs the `bench` extra")
    assert plot(report_of(run_bench(SPEEDS), "vllm off")["summary"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_missing_engine_is_named_and_the_rest_goes_on() -> None:
    bench = run_bench(SPEEDS, missing="vllm")
    text = markdown(report_of(bench, "chameleon off"))
    assert "- vllm off: ModuleNotFoundError: No module named 'vllm'" in text
    assert len(bench.runs) == 2 * 3 and "| vllm" not in text


def test_an_engine_that_fails_is_left_out_from_then_on() -> None:
    bench = run_bench(SPEEDS, broken="vllm")
    assert bench.left_out == {"vllm off": "out of memory", "vllm on": "out of memory"}
    assert {run.cell.variant.engine for run in bench.runs} == {"chameleon"}
