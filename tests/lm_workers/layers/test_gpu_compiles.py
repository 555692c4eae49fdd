"""The kernels for a GPU are compiled where there is none: Triton's interpreter runs Python, which
takes much that its compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile and run them there")
@pytest.mark.timeout(300)
def test_every_kernel_compiles_for_a_gpu_and_fits_in_its_shared_memory(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("TRITON_")
    }
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py")],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = dict(line.split() for line in done.stdout.splitlines())
    wanted = {"norm", "add", "silu_mul", "rotate_and_store", "decode", "combine", "update"}
    assert {f"{name}_kernel" for name in wanted | {"argmax", "first_of"}} <= shared.keys()
    assert max(map(int, shared.values())) < 99 * 1024, "what a consumer's GPU gives a program"
