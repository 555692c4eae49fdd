"""Updates in folders, as vLLM takes them. Needs no vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from adapter_gen.apply import init_bases
from adapter_gen.sites import discover_sites
from adapter_gen.update import LoraDelta, UpdateSpec
from cluster_router.wire.errors import DeltaError
from cluster_router.wire.types import AdapterKey
from lm_workers.models import load_causal_lm, load_lm_head
from lm_workers.vllm.adapters import TENSOR, AdapterFolders


@dataclass
class Folders:
    spec: UpdateSpec
    adapters: AdapterFolders
    forgotten: list[int] = field(default_factory=list)

    def delta(self, cluster: int) -> LoraDelta:
        return LoraDelta.static(AdapterKey("base", "hyper", cluster, 0), self.spec)


@pytest.fixture
def folders(tiny_llama: Path) -> Iterator[Folders]:
    spec = discover_sites(load_causal_lm(tiny_llama, torch.float32, "cpu"), "full", rank=2)
    bases = init_bases(spec, seed=0)
    bases.shift.fill_(0.5)
    forgotten: list[int] = []
    adapters = AdapterFolders(spec, bases, load_lm_head(tiny_llama), True, 2, forgotten.append)
    yield Folders(spec, adapters, forgotten)
    adapters.close()


def test_an_update_is_written_once_in_the_form_that_vllm_takes(folders: Folders) -> None:
    first = folders.adapters.acquire(folders.delta(1))
    assert folders.adapters.acquire(folders.delta(1)) is first
    config = json.loads((first.folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_bias"]) == (2, False)
    assert "lm_head" in config["target_modules"]
    assert first.shift is not None
    assert load_file(first.shift)[TENSOR].shape == (320,)
    assert load_file(first.shift)[TENSOR].abs().max() > 0.001


def test_the_least_recently_used_makes_room_but_none_in_use(folders: Folders) -> None:
    one, two = (folders.adapters.acquire(folders.delta(number)) for number in (1, 2))
    folders.adapters.release(two)
    folders.adapters.release(one)
    again = folders.adapters.acquire(folders.delta(1))
    assert again is one
    three = folders.adapters.acquire(folders.delta(3))
    assert folders.forgotten == [two.number] and not two.folder.exists()
    four = folders.adapters.acquire(folders.delta(4))
    assert len(folders.adapters) == 3 and folders.adapters.users == 3, "all three are in use"
    folders.adapters.release(three)
    assert folders.forgotten == [two.number, three.number]
    new = folders.adapters.acquire(folders.delta(2))
    assert new.number > four.number, "a number never names another update"


def test_an_update_that_does_not_fit_leaves_nothing(folders: Folders) -> None:
    broken = LoraDelta(folders.delta(1).key, cores=np.zeros((1, 2, 2), np.float16))
    with pytest.raises(DeltaError):
        folders.adapters.acquire(broken)
    assert len(folders.adapters) == 0


def test_closing_removes_every_folder(folders: Folders) -> None:
    adapter = folders.adapters.acquire(folders.delta(1))
    folders.adapters.close()
    assert not adapter.folder.exists()


def test_the_blank_one_changes_nothing_and_stays(folders: Folders) -> None:
    blank = folders.adapters.blank()
    weights = load_file(blank.folder / "adapter_model.safetensors")
    assert weights and not any(one.any() for one in weights.values())
    assert blank.shift is None
    for number in range(4):
        adapter = folders.adapters.acquire(folders.delta(number))
        assert adapter.number != blank.number
        folders.adapters.release(adapter)
    assert blank.folder.exists()
