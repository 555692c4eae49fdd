"""Where a model computes, and on how much of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import TypeVar

import torch

from cluster_router.wire.errors import ConfigError

T = TypeVar("T")


def pick_device(name: str) -> str:
    """The device that a setting names.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} asked for, but torch {torch.__version__} sees no CUDA device; "
            "install the `gpu` extra and a driver, or set device to cpu",
            "device",
        )
    return name


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may keep busy at a time.

    A container with a limit on its CPU time sees all cores of its machine: more threads than the
    limit pays for only hold each other up.

    Args:
        cgroup: where control groups are mounted.
    """
    cores = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return cores if quota is None else max(1, min(cores, ceil(quota)))


def in_passing_thread(call: Callable[[], T]) -> T:
    """What `call` gives or raises, run in a thread that ends with it.

    OpenMP keeps a pool of threads for every thread that ever computed. Once there are more of them
    than cores, those of the engine sleep after each loop instead of waiting for the next one, and
    Linux tends to wake them all on the same core.
    """
    with ThreadPoolExecutor(1) as passing:
        return passing.submit(call).result()


def _quota(cgroup: Path) -> float | None:
    """Seconds of CPU time that each second allows; None for any number, or where nothing says."""
    try:
        if (unified := cgroup / "cpu.max").exists():
            quota, period = unified.read_text().split()
        else:  # version 1 of control groups
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((cgroup / "cpu" / name).read_text() for name in names)
        found = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # `max` is no number
        return None
    return found if found > 0 else None
