"""Memory from the system itself: in large pages, or of which only what is written to is taken."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from lm_workers.memory import LARGE_PAGE, LargePages, untouched

MB = 10**6
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def in_large_pages() -> int:
    """Bytes of it that lie in large pages."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(rollup.partition("AnonHugePages:")[2].split()[0])


def test_pieces_are_zeros_of_their_own() -> None:
    pages = LargePages()
    sizes = [3, 1, 700, 5 * MB, 63, 40 * MB, 40 * MB, 90 * MB, 2]
    dtypes = [torch.float32, torch.int32, torch.bfloat16] * 3
    pieces = [
        pages.zeros(size // dtype.itemsize, dtype)
        for size, dtype in zip(sizes, dtypes, strict=True)
    ]
    for number, piece in enumerate(pieces):
        assert piece.dtype == dtypes[number] and piece.data_ptr() % 64 == 0
        assert not piece.any()
        piece.fill_(number + 1)
    for number, piece in enumerate(pieces):
        assert (piece == number + 1).all(), "another piece was written over it"


def test_pieces_lie_in_large_pages() -> None:
    if not SETTING.exists() or "[never]" in SETTING.read_text():
        pytest.skip("this system gives no large pages")
    before = in_large_pages()
    pages = LargePages()
    small = [pages.zeros(MB, torch.int32).fill_(1) for _ in range(8)]
    large = pages.zeros(32 * MB, torch.int32).fill_(1)
    taken = sum(piece.nbytes for piece in [*small, large])
    assert in_large_pages() - before > 0.9 * taken - LARGE_PAGE


def test_what_is_in_use_no_more_goes_back() -> None:
    pages = LargePages()
    before = resident()
    pieces = [pages.zeros(size, torch.int32).fill_(1) for size in [10 * MB] * 5 + [50 * MB]]
    assert resident() - before > 390 * MB
    pieces.clear()
    gc.collect()
    assert resident() - before < 80 * MB, "more than the newest chunk"


def test_untouched_memory_takes_none() -> None:
    assert untouched(0).shape == (0,)  # as of an empty tensor in a checkpoint
    before = resident()
    memory = untouched(500 * MB)
    assert resident() - before < 50 * MB
    assert not memory[::MB].any()
    memory[: 100 * MB].fill_(1)
    assert 90 * MB < resident() - before < 150 * MB
