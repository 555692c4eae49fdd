"""The bench's own processes, with engines on a tiny model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from serving_bench import prepare
from serving_bench.host import HostedEngine
from serving_bench.process import EngineProcess, EngineProcessError
from serving_bench.variants import Inputs, environment
from serving_bench.workload import Trace, Workload, make_workload


@pytest.fixture(scope="module")
def inputs(tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    # Not a model with tied embeddings: with random weights it repeats its prompt's last token.
    model = tiny_checkpoints["qwen3"]
    folder = tmp_path_factory.mktemp("inputs")
    prepare.write_bundle(model, folder / "bundle", "full", 4, clusters=3)
    prepare.write_loras(model, folder / "adapters", 3)
    return Inputs(
        model=model,
        bundle=folder / "bundle",
        adapters=folder / "adapters",
        adapter_rank=prepare.LORA_RANK,
        device="cpu",
        dtype="float32",
        threads=1,
        max_concurrency=4,
        max_context=128,
        settings={"dtype": "float32", "kv_cache_tokens": 2048},
    )


def load(clusters: int | None) -> Workload:
    text = [3 + place % 250 for place in range(2000)]
    return make_workload(text, clusters, 4, 0, requests=6, prompt_tokens=16, output_tokens=5)


def check(traces: list[Trace]) -> list[list[int]]:
    """The answers, after a look at the times."""
    assert all(trace.count == 5 == len(trace.times) for trace in traces)
    assert all(trace.sent < trace.times[0] for trace in traces)
    return [list(trace.tokens) for trace in traces]


def answers(engine: str, inputs: Inputs, clusters: int | None) -> list[list[int]]:
    """What an engine answers, here in this process."""
    module = importlib.import_module(f"serving_bench.engines.{engine}")
    running: HostedEngine = module.start(inputs.job(clusters is not None))
    one = load(clusters)
    running.prepare(one)
    traces = running.run(one)
    running.close()
    return check(traces)


def test_engines_give_the_same_answers_and_updates_change_them(inputs: Inputs) -> None:
    base = answers("chameleon", inputs, None)
    assert answers("transformers", inputs, None) == base
    assert answers("chameleon", inputs, 3) != base


def test_peft_runs_mixed_batches(inputs: Inputs) -> None:
    assert answers("peft", inputs, 3) != answers("transformers", inputs, None)


def test_an_engine_in_a_process_of_its_own(inputs: Inputs, tmp_path: Path) -> None:
    environ = environment("chameleon", sys.executable, 1)
    log = tmp_path / "log"
    process = EngineProcess("chameleon", sys.executable, inputs.job(True), log, environ, 600)
    try:
        traces, peak = process.run(load(3))
        check(traces)
        assert process.ready_mb > 50 and peak > 50
        broken = load(None)
        broken.requests[0].prompt.clear()
        with pytest.raises(EngineProcessError, match=f"prompt has no tokens.*{log}"):
            process.run(broken)
    finally:
        process.close()


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(EngineProcessError, match=r"No module named 'serving_bench\.engines\.none'"):
        EngineProcess("none", sys.executable, {}, tmp_path / "log", {}, timeout=600)
    with pytest.raises(EngineProcessError, match="cannot be run"):
        EngineProcess("vllm", "/nowhere/python", {}, tmp_path / "log", {}, timeout=10)
