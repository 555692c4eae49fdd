"""Which layout and which kernels a setting means on this machine."""

from __future__ import annotations

import logging

import torch

from cluster_router.wire.errors import ConfigError
from lm_workers.config import KernelsName, LayoutName
from lm_workers.layers.compiler import CompileError
from lm_workers.layers.kernels import Kernels
from lm_workers.layers.linear import PackedProduct, PlainProduct, Product
from lm_workers.layers.native import NATIVE_DTYPES, NativeKernels
from lm_workers.layers.panels import (
    ByteProduct,
    HalfByteProduct,
    PairProduct,
    PanelProduct,
    TileProduct,
    load_bytes,
    load_floats,
    load_pairs,
    load_tiles,
)
from lm_workers.layers.reference import ReferenceKernels

log = logging.getLogger(__name__)


def choose_layout(name: LayoutName, dtype: torch.dtype, device: str) -> type[Product]:
    """The layout of the weights.

    Raises:
        ConfigError: `packed` or `int8` where there is no such layout.
    """
    if name == "plain":
        return PlainProduct
    found = _bytes(dtype, device) if name == "int8" else _packed(dtype, device)
    if not isinstance(found, str):
        return found
    if name != "auto":
        raise ConfigError(f"linear: {name} is not possible: {found}; use auto", "linear")
    return PlainProduct


def _packed(dtype: torch.dtype, device: str) -> type[Product] | str:
    """The layout for this CPU's kernels, or why there is none."""
    if device == "cpu" and dtype == torch.float32:
        try:
            load_floats()
            return PanelProduct
        except CompileError as error:
            return str(error)
    if device == "cpu" and dtype == torch.bfloat16:
        try:
            if torch.cpu._is_amx_tile_supported():
                load_tiles()
                return TileProduct
            load_pairs()
            return PairProduct
        except CompileError as error:
            log.info("bfloat16 products are oneDNN's: %s", error)
        return PackedProduct if _onednn_has_bfloat16() else "this CPU does not compute in bfloat16"
    return _elsewhere(dtype, device)


def _bytes(dtype: torch.dtype, device: str) -> type[Product] | str:
    """The layout in 8 bits, or why there is none."""
    if device != "cpu" or dtype not in NATIVE_DTYPES:
        return _elsewhere(dtype, device)
    try:
        load_bytes(dtype)
    except CompileError as error:
        return str(error)
    return ByteProduct if dtype == torch.float32 else HalfByteProduct


def _elsewhere(dtype: torch.dtype, device: str) -> str:
    return f"it is for float32 and bfloat16 on a CPU, not for {dtype} on {device}"


def choose_kernels(name: KernelsName, dtype: torch.dtype, device: str) -> Kernels:
    """The kernels beside the matrix products.

    Raises:
        ConfigError: `native` where they cannot run.
    """
    if name == "reference":
        return ReferenceKernels()
    if device.startswith("cuda"):
        return _gpu_kernels(name, dtype, device)
    reason = f"on a CPU they are for float32 and bfloat16, not for {dtype}"
    if device == "cpu" and dtype in NATIVE_DTYPES:
        try:
            return NativeKernels(dtype, torch.get_num_threads())
        except CompileError as error:
            reason = str(error)
            log.warning("running without compiled kernels, several times slower: %s", reason)
    if name == "native":
        raise ConfigError(f"kernels: native is not possible: {reason}; use auto", "kernels")
    return ReferenceKernels()


def _gpu_kernels(name: KernelsName, dtype: torch.dtype, device: str) -> Kernels:
    try:
        from lm_workers.layers.gpu import GpuKernels

        kernels = GpuKernels()
        with torch.cuda.device(device):
            one = torch.ones(1, 16, dtype=dtype, device=device)
            kernels.rms_norm(one, one[0], 1e-5)  # Triton misses a C compiler only now
    except Exception as error:
        if name == "native":
            raise ConfigError(
                f"kernels: native needs Triton on a GPU, and that failed ({error}); install triton "
                "and a C compiler, or use auto",
                "kernels",
            ) from error
        log.warning("running without Triton's kernels, more slowly: %s", error)
        return ReferenceKernels()
    return kernels


def _onednn_has_bfloat16() -> bool:
    found: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.mkldnn.is_available() and found
