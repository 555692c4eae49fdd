from __future__ import annotations

import pytest
import torch
from layer_cases import Carried

from lm_workers.layers.native import NATIVE_DTYPES, NativeKernels


@pytest.fixture(params=sorted(NATIVE_DTYPES, key=str), ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["native", "triton"])
def compiled(request: pytest.FixtureRequest, dtype: torch.dtype) -> Carried:
    """Kernels in C++, and those in Triton: on a GPU, or in Triton's interpreter where none is."""
    if request.param == "native":
        request.getfixturevalue("cxx")
        return Carried(NativeKernels(dtype, threads=2), "cpu")
    pytest.importorskip("triton", reason="needs Triton")
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter cuts bfloat16 off where a GPU rounds it")
    from lm_workers.layers.gpu import GpuKernels

    return Carried(GpuKernels(), "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def native(cxx: str, dtype: torch.dtype) -> NativeKernels:
    return NativeKernels(dtype, threads=2)
