"""The kernels in C++, for a CPU, called through ctypes."""

from __future__ import annotations

import ctypes
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch

from lm_workers.adapters import UpdateTargets
from lm_workers.layers.compiler import compile_library
from lm_workers.layers.kernels import HeadNorms, LateUpdate
from lm_workers.layers.paged import PagedStep
from lm_workers.layers.tape import Function, empty

NATIVE_DTYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16"}
"""Types that the source compiles for, and the macro that selects each."""

# Letters of `Function`, in the order of native.cpp.
_LATE = "pppi"
_SIGNATURES = {
    "add": f"ppiii{_LATE}i",
    "rms_norm": f"ppipfiip{_LATE}i",
    "rotate_and_store": f"pippppfpppiiii{_LATE}i",
    "silu_mul": f"pipii{_LATE}i",
    "argmax": "pipiii",
    "update": f"pii{_LATE}i",
    "attend": "pippppipiiiiiifi",
}
_NULL = 0
_NOTHING = (_NULL, _NULL, _NULL, 0)


class _Update(ctypes.Structure):
    """The parts of an update that stay where they are; see native.cpp."""

    _fields_: ClassVar = [
        ("cores", ctypes.c_void_p),
        ("num_sites", ctypes.c_int64),
        ("pieces", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("num_targets", ctypes.c_int64),
        ("rank", ctypes.c_int64),
    ]


class NativeKernels:
    """See `Kernels`.

    Args:
        dtype: of the model; a key of `NATIVE_DTYPES`.
        threads: to run on.

    Raises:
        CompileError: there is no compiler that takes the source.
    """

    late_rank: ClassVar[int] = 2**31
    most_context: ClassVar[int | None] = None
    taped: ClassVar[bool] = True

    def __init__(self, dtype: torch.dtype, threads: int) -> None:
        library = compile_library("native.cpp", NATIVE_DTYPES[dtype])
        functions = {
            name: Function(library, name, signature) for name, signature in _SIGNATURES.items()
        }
        self._add = functions["add"]
        self._rms_norm = functions["rms_norm"]
        self._rotate_and_store = functions["rotate_and_store"]
        self._silu_mul = functions["silu_mul"]
        self._argmax = functions["argmax"]
        self._update = functions["update"]
        self._attend = functions["attend"]
        self._threads = threads
        self._updates: WeakKeyDictionary[UpdateTargets, tuple[torch.Tensor, _Update]]
        self._updates = WeakKeyDictionary()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Kernels`."""
        return self._norm(_NULL, x, weight, eps, None)

    def add(self, residual: torch.Tensor, x: torch.Tensor, late: LateUpdate | None) -> None:
        """See `Kernels`."""
        rows, size = x.shape
        self._add(
            residual.data_ptr(), x.data_ptr(), x.stride(0), rows, size, *self._late(late),
            self._threads,
        )  # fmt: skip

    def add_rms_norm(
        self,
        residual: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        late: LateUpdate | None = None,
    ) -> torch.Tensor:
        """See `Kernels`."""
        return self._norm(residual.data_ptr(), x, weight, eps, late)

    def _norm(
        self,
        residual: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        late: LateUpdate | None,
    ) -> torch.Tensor:
        rows, size = x.shape
        out = empty(x, rows, size)
        self._rms_norm(
            residual, x.data_ptr(), x.stride(0), weight.data_ptr(), eps,
            rows, size, out.data_ptr(), *self._late(late), self._threads,
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
        keys, values = paged.cache.keys[layer], paged.cache.values[layer]
        _, kv_heads, size = keys.shape
        rows, stride = len(qkv), qkv.stride(0)
        heads = qkv.shape[1] // size - 2 * kv_heads
        query_norm, key_norm, eps = _NULL, _NULL, 0.0
        if norms is not None:
            query_norm, key_norm, eps = norms.query.data_ptr(), norms.key.data_ptr(), norms.eps
        self._rotate_and_store(
            qkv.data_ptr(), stride, rotary[0].data_ptr(), rotary[1].data_ptr(),
            query_norm, key_norm, eps, paged.write_slots.data_ptr(),
            keys.data_ptr(), values.data_ptr(), rows, heads, kv_heads, size,
            *self._late(late), self._threads,
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
        out = empty(query, rows, heads, size)
        self._attend(
            query.data_ptr(), query.stride(0), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            paged.spans.data_ptr(), len(paged.spans), paged.tables.data_ptr(),
            paged.tables.shape[1], heads, keys.shape[1], size, paged.block_size, window or 0,
            scaling, self._threads,
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: torch.Tensor, late: LateUpdate | None = None) -> torch.Tensor:
        """See `Kernels`."""
        rows, size = len(gate_up), gate_up.shape[1] // 2
        out = empty(gate_up, rows, size)
        self._silu_mul(
            gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), rows, size,
            *self._late(late), self._threads,
        )  # fmt: skip
        return out

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """See `Kernels`."""
        rows, size = x.shape
        out = torch.empty(rows, dtype=torch.int64)
        self._argmax(x.data_ptr(), x.stride(0), out.data_ptr(), rows, size, self._threads)
        return out

    def update(self, y: torch.Tensor, late: LateUpdate) -> None:
        """See `Kernels`."""
        self._update(y.data_ptr(), y.stride(0), len(y), *self._late(late), self._threads)

    def _late(self, late: LateUpdate | None) -> tuple[int, int, int, int]:
        """An update as the functions take it."""
        if late is None:
            return _NOTHING
        cores, numbers = self._updates.get(late.targets, _UNKNOWN)
        if numbers is None or cores is not late.cores:
            numbers = self._lay_out(late)
        at = ctypes.addressof(numbers)
        return at, late.slots.data_ptr(), late.low.data_ptr(), late.low.stride(0)

    def _lay_out(self, late: LateUpdate) -> _Update:
        """Note where an update's fixed parts are. They stay alive as long as it."""
        targets, (_, sites, rank, _) = late.targets, late.cores.shape
        numbers = _Update(
            late.cores.data_ptr(), sites, targets.pieces.data_ptr(), targets.targets.data_ptr(),
            len(targets.targets), rank,
        )  # fmt: skip
        self._updates[targets] = late.cores, numbers
        return numbers


_UNKNOWN = (None, None)
