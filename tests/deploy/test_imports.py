"""How soon a lost replica is back is mostly what its process imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODEL_CLASSES = "transformers.modeling_utils"


@pytest.mark.parametrize("module", ["router", "generator", "learning", "refining", "console"])
def test_only_who_runs_a_model_imports_model_classes(module: str) -> None:
    code = f"import sys, deploy.{module}; print({MODEL_CLASSES!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_the_board_imports_neither_torch_nor_faiss() -> None:
    code = "import sys, deploy.console; print({'torch', 'faiss'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "set()"


def test_the_name_is_right() -> None:
    code = f"import sys, deploy.lm; print({MODEL_CLASSES!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"
