"""Float32 products from weights laid out in panels, by the C++ of product.cpp."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from lm_workers.layers.compiler import compile_library
from lm_workers.layers.linear import Product

_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64
_PART = 4096
"""Rows of a weight that are widened at a time; whole panels."""


class PanelProduct(Product):
    """The numbers of `PlainProduct` in float32, up to the order of a sum.

    Where every weight is a bfloat16 number, as in most checkpoints, 16 bits of each are kept: half
    the memory, and half the reading, which is what a step of few rows spends its time on. The
    arithmetic is float32 either way, and the result of a row does not depend on the others.

    Raises:
        CompileError: there is no compiler that takes the source.
    """

    min_rows = 1
    widens = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        library = load_library()
        self._outputs, self._inputs = weight.shape
        self._halves = int(is_bfloat16(weight))
        self._threads = torch.get_num_threads()
        self._bias = None if bias is None else bias.float().contiguous()
        self._bias_at = None if self._bias is None else self._bias.data_ptr()
        size = library.panels_size(self._outputs, self._inputs, self._halves)
        self._panels = torch.zeros(size, dtype=torch.float32)
        self._panels_at = self._panels.data_ptr()
        at = self._panels_at
        for part in weight.split(_PART):
            wide = part.float()
            library.lay_out(
                wide.data_ptr(), *wide.stride(), len(wide), self._inputs, self._halves,
                at, self._threads,
            )  # fmt: skip
            at += 4 * library.panels_size(len(wide), self._inputs, self._halves)
        self._product = library.product

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, out]."""
        if x.stride(1) != 1:
            x = x.contiguous()
        rows = len(x)
        y = x.new_empty(rows, self._outputs)
        self._product(
            x.data_ptr(), x.stride(0), self._panels_at, self._halves, self._bias_at,
            y.data_ptr(), self._outputs, rows, self._inputs, self._outputs, self._threads,
        )  # fmt: skip
        return y


def is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether each number of a weight is one of bfloat16's."""
    if weight.dtype == torch.bfloat16:
        return True
    return not any((part.float().view(torch.int32) & 0xFFFF).any() for part in weight.split(_PART))


@cache
def load_library() -> ctypes.CDLL:
    """The compiled functions. Raises CompileError where there is no compiler."""
    library = compile_library("product.cpp", "FLOAT32")
    library.panels_size.argtypes = [_INT] * 3
    library.panels_size.restype = _INT
    library.lay_out.argtypes = [_POINTER, *[_INT] * 5, _POINTER, _INT]
    library.lay_out.restype = None
    library.product.argtypes = [
        _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _INT, _INT, _INT, _INT, _INT
    ]  # fmt: skip
    library.product.restype = None
    return library
