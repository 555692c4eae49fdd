from __future__ import annotations

import pytest

from lm_workers.layers.compiler import CompileError, _find_compiler


@pytest.fixture
def cxx() -> str:
    """The C++ compiler; skips where there is none. Sources that it refuses are no such reason."""
    try:
        return _find_compiler()
    except CompileError as error:
        pytest.skip(str(error))
