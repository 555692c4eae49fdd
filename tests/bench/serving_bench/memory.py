"""Peak memory of a process and its children, from /proc. Standard library only."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
MARK = "VmHWM:"  # high-water mark of the resident set


def descendants(root: int) -> list[int]:
    """`root` and every process below it."""
    parents = {}
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            with suppress(OSError, IndexError):
                # The name in brackets may hold anything; the parent is the second field after it.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def peak_mb(root: int) -> float:
    """Sum of the peak resident sizes of a process tree, in MB of 10^6 bytes."""
    total = 0
    for process in descendants(root):
        with suppress(OSError):
            for line in (PROC / str(process) / "status").read_text().splitlines():
                if line.startswith(MARK):
                    total += 1024 * int(line.split()[1])
    return total / 1e6


def reset_peak() -> None:
    """Start the marks of this process tree again at what is resident now."""
    for process in descendants(os.getpid()):
        with suppress(OSError):
            (PROC / str(process) / "clear_refs").write_text("5")
