"""Memory of the CPU that torch's allocator would not give in this way."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

import torch

LARGE_PAGE = 2**21
"""Bytes of a large page where pages have 4 KiB."""

_CHUNK = 2**26
_LINE = 64


def untouched(size: int) -> torch.Tensor:
    """Zeros, uint8 [size], that take memory only where something was written."""
    return torch.frombuffer(_mapped(max(1, size)), dtype=torch.uint8)[:size]


def give_back() -> None:
    """Return freed memory that the C library keeps to the system, where it can do so (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class LargePages:
    """Memory in large pages, where the system has them, for what is read from end to end.

    A step reads all weights once. In pages of 4 KiB the CPU looks up where each of tens of
    thousands lies, which takes up to a quarter of the products' time (docs/guides/performance.md).

    Little pieces lie side by side in chunks of the system's memory, large ones have one of their
    own. A chunk goes back when none of its pieces is in use any more, but for the newest.
    """

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def zeros(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros [count], aligned to a line of the CPU's cache."""
        size = count * dtype.itemsize
        room = -(-size // _LINE) * _LINE
        if room >= _CHUNK:
            return _large(room)[:size].view(dtype)
        with self._lock:
            if room > len(self._left):
                self._left = _large(_CHUNK)
            given, self._left = self._left[:size], self._left[room:]
        return given.view(dtype)


def _large(size: int) -> torch.Tensor:
    """Zeros, uint8 [size], that begin with a large page."""
    fresh = _mapped(size + LARGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
        with contextlib.suppress(OSError):  # built without them
            fresh.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(fresh, dtype=torch.uint8)
    begin = -whole.data_ptr() % LARGE_PAGE
    return whole[begin : begin + size]


def _mapped(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
