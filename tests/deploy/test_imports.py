"""How soon a lost replica is back is mostly what its process imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"transformers.modeling_utils", "torch._dynamo", "sympy", "scipy"}


@pytest.mark.parametrize(
    "module", ["router", "generator", "learning", "refining", "console", "lm", "app"]
)
def test_nobody_imports_model_classes_or_torchs_compiler(module: str) -> None:
    code = f"import sys, deploy.{module}; print({HEAVY!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "set()"


def test_the_board_imports_neither_torch_nor_faiss() -> None:
    code = "import sys, deploy.console; print({'torch', 'faiss'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "set()"


def test_the_names_are_right() -> None:
    code = (
        "import sys, transformers.models.llama.modeling_llama; "
        f"print(len({HEAVY!r} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) == len(HEAVY)
