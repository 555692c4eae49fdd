"""Products from weights laid out in panels, by the C++ of the product*.cpp beside this file."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from functools import cache
from typing import ClassVar

import torch

from lm_workers.layers.compiler import CompileError, compile_library
from lm_workers.layers.linear import Lookup, Product
from lm_workers.layers.native import NATIVE_DTYPES
from lm_workers.layers.tape import Function, empty
from lm_workers.memory import LargePages

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_PRODUCT, _ROWS = "pipppiiiii", "pppiii"
"""Signatures, for `Function`."""
_MEMORY = LargePages()
_PART = 4096
"""Rows of a weight that are widened at a time; whole panels."""


class _Panels(Product):
    """What they have in common. The result of a row does not depend on the others."""

    min_rows = 1
    taped = True
    dtype: ClassVar[torch.dtype]

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._outputs, self._inputs = weight.shape
        self._threads = torch.get_num_threads()
        self._bias = bias
        self._bias_at = 0 if bias is None else bias.data_ptr()
        self._panels, self._product, self._rows = self._lay_out(weight)
        self._panels_at = self._panels.data_ptr()

    @abstractmethod
    def _lay_out(self, weight: torch.Tensor) -> tuple[torch.Tensor, Function, Function]:
        """The panels, the function that multiplies with them, and the one that reads them."""

    def _fill(
        self, panels: torch.Tensor, weight: torch.Tensor, library: ctypes.CDLL, *form: int
    ) -> None:
        """Lay a weight out that is read in float32, a part of it at a time in that."""
        at = panels.data_ptr()
        for part in weight.split(_PART):
            wide = part.float()
            library.lay_out(wide.data_ptr(), *wide.stride(), *wide.shape, *form, at, self._threads)
            at += 4 * library.panels_size(*wide.shape, *form)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = len(x)
        y = empty(x, rows, self._outputs)
        self._product(
            x.data_ptr(), x.stride(0), self._panels_at, self._bias_at, y.data_ptr(),
            self._outputs, rows, self._inputs, self._outputs, self._threads,
        )  # fmt: skip
        return y

    @property
    def rows(self) -> Lookup:
        """See `Product`."""
        return self._look_up

    def _look_up(self, numbers: torch.Tensor) -> torch.Tensor:
        numbers = numbers.contiguous()
        found = torch.empty(len(numbers), self._inputs, dtype=self.dtype)
        self._rows(
            self._panels_at, numbers.data_ptr(), found.data_ptr(), len(numbers), self._inputs,
            self._threads,
        )  # fmt: skip
        return found


class PanelProduct(_Panels):
    """The numbers of `PlainProduct` in float32, up to the order of a sum.

    Where every weight is a bfloat16 number, as in most checkpoints, 16 bits of each are kept: half
    the memory, and half the reading, which is what a step of few rows spends its time on. The
    arithmetic is float32 either way.

    Raises:
        CompileError: there is no compiler that takes the source.
    """

    dtype = torch.float32
    widens = True
    stacks = False  # below a V, which has more bits, weights would lose their short form

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, None if bias is None else bias.float().contiguous())

    def _lay_out(self, weight: torch.Tensor) -> tuple[torch.Tensor, Function, Function]:
        library, halves = load_floats(), int(is_bfloat16(weight))
        size = library.panels_size(self._outputs, self._inputs, halves)
        panels = _MEMORY.zeros(size, torch.float32)
        self._fill(panels, weight, library, halves)
        kind = "halves" if halves else "floats"
        product = Function(library, f"product_of_{kind}", _PRODUCT)
        return panels, product, Function(library, f"rows_of_{kind}", _ROWS)


class _BytePanels(_Panels):
    """Nearly the numbers of `PlainProduct`, from weights in 8 bits.

    Every output of a weight has a scale of its own, and so has every row that is multiplied: both
    are brought to whole numbers from -127 to 127, rows as they come, after numbers far larger than
    the others were spread over their neighbours. Sums are exact.

    Raises:
        CompileError: the CPU has no instruction for it, or no compiler takes the source.
    """

    rounding = 0.1

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__(weight, None if bias is None else bias.to(self.dtype).contiguous())

    def _lay_out(self, weight: torch.Tensor) -> tuple[torch.Tensor, Function, Function]:
        library = load_bytes(self.dtype)
        panels = _MEMORY.zeros(library.panels_size(self._outputs, self._inputs), torch.int32)
        self._fill(panels, weight, library)
        return panels, Function(library, "product", _PRODUCT), Function(library, "rows", _ROWS)


class ByteProduct(_BytePanels):
    """In float32 but for the weights."""

    dtype = torch.float32
    widens = True


class HalfByteProduct(_BytePanels):
    """In bfloat16 but for the weights."""

    dtype = torch.bfloat16


class _HalfPanels(_Panels):
    """In bfloat16."""

    dtype = torch.bfloat16

    @staticmethod
    @abstractmethod
    def _load() -> ctypes.CDLL:
        """The functions."""

    def _lay_out(self, weight: torch.Tensor) -> tuple[torch.Tensor, Function, Function]:
        library = self._load()
        size = library.panels_size(self._outputs, self._inputs)
        panels = _MEMORY.zeros(size, torch.int32)
        library.lay_out(
            weight.data_ptr(), *weight.stride(), self._outputs, self._inputs,
            panels.data_ptr(), self._threads,
        )  # fmt: skip
        return panels, Function(library, "product", _PRODUCT), Function(library, "rows", _ROWS)


class PairProduct(_HalfPanels):
    """The numbers of `PlainProduct` in bfloat16, up to the order of a sum, by the instruction of a
    CPU that multiplies pairs of them and adds up in float32.

    Raises:
        CompileError: the CPU has no such instruction, or no compiler takes the source.
    """

    @staticmethod
    def _load() -> ctypes.CDLL:
        return load_pairs()


class TileProduct(_HalfPanels):
    """The same by the instruction of a CPU that multiplies tiles of 16 rows.

    Raises:
        CompileError: the CPU has no such instruction, no compiler takes the source, or the system
            does not let this process use it.
    """

    @staticmethod
    def _load() -> ctypes.CDLL:
        return load_tiles()


def is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether each number of a weight is one of bfloat16's."""
    if weight.dtype == torch.bfloat16:
        return True
    return not any((part.float().view(torch.int32) & 0xFFFF).any() for part in weight.split(_PART))


@cache
def load_floats() -> ctypes.CDLL:
    """The functions for float32. Raises CompileError where there is no compiler."""
    library = compile_library("product.cpp", "FLOAT32")
    _declare(library, 1)
    return library


@cache
def load_bytes(dtype: torch.dtype) -> ctypes.CDLL:
    """The functions for weights in 8 bits, beside `dtype`. Raises CompileError as the others do."""
    library = compile_library("product_int8.cpp", NATIVE_DTYPES[dtype])
    _declare(library, 0)
    return library


@cache
def load_pairs() -> ctypes.CDLL:
    """The functions for bfloat16. Raises CompileError where they cannot run."""
    library = compile_library("product_bf16.cpp", "BFLOAT16")
    _declare(library, 0)
    return library


@cache
def load_tiles() -> ctypes.CDLL:
    """The functions for bfloat16 in tiles. Raises CompileError where they cannot run."""
    library = compile_library("product_amx.cpp", "BFLOAT16")
    _declare(library, 0)
    library.request.restype = _INT
    if library.request():
        raise CompileError("the system does not let this process use the CPU's tiles (AMX)")
    return library


def _declare(library: ctypes.CDLL, forms: int) -> None:
    """Tell ctypes the arguments. `forms` is 1 where panels come in two forms."""
    library.panels_size.argtypes = [_INT] * (2 + forms)
    library.panels_size.restype = _INT
    library.lay_out.argtypes = [_POINTER, *[_INT] * (4 + forms), _POINTER, _INT]
    library.lay_out.restype = None
