"""The kernels in C++, for a CPU, called through ctypes."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch

from lm_workers.layers.compiler import compile_library
from lm_workers.layers.kernels import HeadNorms, LateUpdate
from lm_workers.layers.paged import PagedStep

NATIVE_DTYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16"}
"""Types that the source compiles for, and the macro that selects each."""

# p: pointer or None, i: int64, f: float; in the order of native.cpp.
_SIGNATURES = {
    "rms_norm": "ppipfiipi",
    "rotate_and_store": "pippppfpppiiiii",
    "silu_mul": "pipiii",
    "argmax": "pipiii",
    "update": "pipiipipppiii",
    "attend": "pippppipiiiiiifi",
}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class NativeKernels:
    """See `Kernels`.

    Args:
        dtype: of the model; a key of `NATIVE_DTYPES`.
        threads: to run on.

    Raises:
        CompileError: there is no compiler that takes the source.
    """

    late_rank: ClassVar[int] = 0
    most_context: ClassVar[int | None] = None

    def __init__(self, dtype: torch.dtype, threads: int) -> None:
        library = compile_library("native.cpp", NATIVE_DTYPES[dtype])
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = [_TYPES[letter] for letter in signature]
            function.restype = None
        self._rms_norm = library.rms_norm
        self._rotate_and_store = library.rotate_and_store
        self._silu_mul = library.silu_mul
        self._argmax = library.argmax
        self._update = library.update
        self._attend = library.attend
        self._threads = threads

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels`."""
        return self._norm(None, x, weight, eps)

    def add(self, residual: torch.Tensor, x: torch.Tensor, late: LateUpdate | None) -> None:
        """See `Kernels`."""
        assert late is None
        residual += x

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """See `Kernels`."""
        assert late is None
        return self._norm(residual.data_ptr(), x, weight, eps)

    def _norm(
        self, residual: int | None, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        rows, size = x.shape
        out = x.new_empty(rows, size)
        self._rms_norm(
            residual, x.data_ptr(), x.stride(0), weight.data_ptr(), eps,
            rows, size, out.data_ptr(), self._threads,
        )  # fmt: skip
        return out

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        norms: HeadNorms | None,
        paged: PagedStep,
        layer: int,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """See `Kernels`. The queries stay where they are in `qkv`."""
        assert late is None
        keys, values = paged.cache.keys[layer], paged.cache.values[layer]
        _, kv_heads, size = keys.shape
        rows, stride = len(qkv), qkv.stride(0)
        heads = qkv.shape[1] // size - 2 * kv_heads
        query_norm, key_norm, eps = None, None, 0.0
        if norms is not None:
            query_norm, key_norm, eps = norms.query.data_ptr(), norms.key.data_ptr(), norms.eps
        self._rotate_and_store(
            qkv.data_ptr(), stride, rotary[0].data_ptr(), rotary[1].data_ptr(),
            query_norm, key_norm, eps, paged.write_slots.data_ptr(),
            keys.data_ptr(), values.data_ptr(), rows, heads, kv_heads, size, self._threads,
        )  # fmt: skip
        return qkv.as_strided((rows, heads, size), (stride, size, 1))

    def attend(
        self,
        query: torch.Tensor,
        paged: PagedStep,
        layer: int,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """See `Kernels`."""
        rows, heads, size = query.shape
        if query.stride() != (query.stride(0), size, 1):
            query = query.contiguous()
        keys, values = paged.cache.keys[layer], paged.cache.values[layer]
        out = query.new_empty(rows, heads, size)
        self._attend(
            query.data_ptr(), query.stride(0), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            paged.spans.data_ptr(), len(paged.spans), paged.tables.data_ptr(),
            paged.tables.shape[1], heads, keys.shape[1], size, paged.block_size, window or 0,
            scaling, self._threads,
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: torch.Tensor, late: LateUpdate | None = None) -> torch.Tensor:
        """See `Kernels`."""
        assert late is None
        rows, size = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        self._silu_mul(
            gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), rows, size, self._threads
        )
        return out

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        rows, size = x.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._argmax(x.data_ptr(), x.stride(0), out.data_ptr(), rows, size, self._threads)
        return out

    def update(self, y: torch.Tensor, late: LateUpdate) -> None:
        """See `Kernels`."""
        targets, low = late.targets, late.low
        _, sites, rank, _ = late.cores.shape
        self._update(
            y.data_ptr(), y.stride(0), low.data_ptr(), low.stride(0), len(y),
            late.cores.data_ptr(), sites, late.slots.data_ptr(), targets.pieces.data_ptr(),
            targets.targets.data_ptr(), len(targets.targets), rank, self._threads,
        )  # fmt: skip
