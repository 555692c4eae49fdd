"""The processes of a service on this machine: found, measured, killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import psutil

CONTROLLER = "ray::ServeController"
PROXY = "ray::ProxyActor"


def replica(app: str, deployment: str) -> str:
    """How the process of a replica of `deployment` is titled."""
    return f"ray::ServeReplica:{app}:{deployment}"


def titled(title: str) -> Iterator[psutil.Process]:
    """Processes of this user whose title begins so."""
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).startswith(title):
            yield process


def pids(title: str) -> set[int]:
    """Their ids."""
    return {process.pid for process in titled(title)}


def kill(title: str) -> int:
    """Kill -9 one such process; returns its id."""
    process = next(titled(title))
    process.kill()
    process.wait(10)
    return process.pid


def measured(title: str) -> tuple[int, int]:
    """Resident bytes and open file handles of all such processes together."""
    memory = handles = 0
    for process in titled(title):
        with suppress(psutil.Error):
            memory += process.memory_info().rss
            handles += process.num_fds()
    return memory, handles


def until(check: Callable[[], bool], within_s: float) -> float:
    """Seconds until `check` holds.

    Raises:
        AssertionError: it does not in time.
    """
    begun = time.monotonic()
    while not check():
        if time.monotonic() - begun > within_s:
            raise AssertionError(f"not within {within_s} s")
        time.sleep(0.1)
    return time.monotonic() - begun
