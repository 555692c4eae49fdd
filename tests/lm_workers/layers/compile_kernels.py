"""Compile every kernel that `GpuKernels` starts for a Hopper GPU, which need not be there.

Prints the kernels and the most bytes of shared memory that each of them takes. Run by
test_gpu_compiles.py, in a process without Triton's interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lm_workers.adapters import UpdateTargets
from lm_workers.kv_cache import KVCache
from lm_workers.layers.gpu import GpuKernels
from lm_workers.layers.kernels import HeadNorms, LateUpdate
from lm_workers.layers.paged import PagedStep

ROWS = 20
SHARED: dict[str, int] = {}


class Absent:
    """What Triton asks its driver for before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(function: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
    """In place of `JITFunction.run`."""
    kernel = RUN(function, *args, warmup=True, **kwargs)
    name = function.__name__
    SHARED[name] = max(SHARED.get(name, 0), kernel.metadata.shared)


RUN = JITFunction.run


def late(dtype: torch.dtype, rank: int, *sites: list[int]) -> LateUpdate:
    """An update of outputs whose columns [first, first + count) are of a site."""
    columns = sum(count for _, _, count in sites)
    u = torch.ones(rank, columns, dtype=dtype)
    targets = UpdateTargets(torch.tensor(sites), u, torch.empty(0))
    low = torch.ones(ROWS, len(sites) * rank, dtype=dtype)
    cores = torch.ones(4, 3, rank, rank, dtype=dtype)
    return LateUpdate(low, targets, cores, torch.zeros(ROWS, dtype=torch.int64))


def paged(dtype: torch.dtype, rows: int, longest: int, size: int) -> PagedStep:
    """A step of one token of each of `rows` sequences."""
    config = SimpleNamespace(
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=size
    )
    row = torch.arange(rows)
    lengths = torch.full_like(row, longest)
    return PagedStep(
        cache=KVCache(config, 64, dtype, "cpu"),  # type: ignore[arg-type]
        block_size=16,
        write_slots=torch.zeros_like(row),
        spans=torch.stack([row, row + 1, lengths], 1),
        lengths=lengths,
        tables=torch.zeros(rows, longest // 16, dtype=torch.int64),
    )


def compile_all(kernels: GpuKernels, dtype: torch.dtype) -> None:
    """Every method, without an update and with small and large ones."""
    x, residual = torch.ones(ROWS, 400, dtype=dtype), torch.ones(ROWS, 400, dtype=dtype)
    weight, head = torch.ones(400, dtype=dtype), torch.ones(128, dtype=dtype)
    step, rotary = paged(dtype, ROWS, 32, 128), (torch.ones(ROWS, 128, dtype=dtype),) * 2
    qkv = torch.ones(ROWS, 8 * 128, dtype=dtype)
    for rank in (None, 4, 32):

        def one(*sites: list[int], rank: int | None = rank) -> LateUpdate | None:
            return None if rank is None else late(dtype, rank, *sites)

        kernels.add_rms_norm(residual, x, weight, 1e-5, one([1, 0, 400]))
        kernels.add(residual, x, one([1, 0, 400]))
        kernels.silu_mul(x, one([0, 0, 200], [2, 200, 200]))
        norms = HeadNorms(head, head, 1e-6) if rank == 4 else None
        changes = one([1, 0, 512], [0, 512, 256], [2, 768, 256])
        kernels.rotate_and_store(qkv, rotary, norms, step, 0, changes)
        if rank is not None:
            kernels.update(x, late(dtype, rank, [0, 0, 200], [2, 200, 200]))
    kernels.argmax(torch.ones(3, 50_000, dtype=dtype))
    for size, window in ((64, None), (128, 300), (256, None)):
        query = torch.ones(2, 4, size, dtype=dtype)
        kernels.attend(query, paged(dtype, 2, 704, size), 0, 0.3, window)


if __name__ == "__main__":
    driver.set_active(Absent())
    JITFunction.run = compile_only
    for dtype in (torch.bfloat16, torch.float32):
        compile_all(GpuKernels(), dtype)
    for name, most in SHARED.items():
        print(name, most)
