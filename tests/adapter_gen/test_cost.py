"""What a cluster costs: bytes of its update, and processor time to generate it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapter_gen.apply import init_bases
from adapter_gen.bundle import Bundle
from adapter_gen.generator import AdapterGenerator
from adapter_gen.hypernetwork import CoreConfig
from adapter_gen.sites import discover_sites

LIMIT_BYTES = 108 * 1024
LIMIT_SECONDS = 0.020
RUNS = 20


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["shipped", "core"])
def bundle(request: pytest.FixtureRequest, bundle_path: Path, default_model: Path) -> Bundle:
    """The shipped bundle, a memory; and a core hypernetwork of random weights over its clusters."""
    shipped = Bundle.load(bundle_path, None)
    if request.param == "shipped":
        return shipped
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(default_model))
    spec = discover_sites(model, "full", rank=16)
    torch.manual_seed(0)
    hypernetwork = CoreConfig().build(spec, shipped.hypernetwork.conditioning_dim)
    torch.nn.init.normal_(hypernetwork.cores.weight, std=0.02)
    return replace(shipped, hypernetwork=hypernetwork, bases=init_bases(spec, seed=0))


def test_an_update_is_small_and_soon_there(bundle: Bundle, one_thread: None) -> None:
    generator, snapshot = AdapterGenerator(bundle), bundle.snapshot
    seconds = []
    for run in range(RUNS + 2):
        row = run % len(snapshot)
        # The time of this thread on its processor: other processes do not count, and with torch
        # on one thread it is what the caller would wait for on an idle machine.
        started = time.thread_time()
        delta = generator.generate(bundle.key(snapshot, row), snapshot.conditioning_of(row))
        seconds.append(time.thread_time() - started)
        assert delta.nbytes == 2 * bundle.spec.numbers_per_cluster <= LIMIT_BYTES
    assert statistics.median(seconds[2:]) <= LIMIT_SECONDS
