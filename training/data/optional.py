"""Libraries that only some data needs, loaded when it comes to that."""

from __future__ import annotations

import importlib
from types import ModuleType

from cluster_router.wire.errors import SetupError


def load(module: str, package: str, purpose: str) -> ModuleType:
    """Import `module`.

    Raises:
        SetupError: it is not installed; names `package` and what needs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SetupError(
            f"{purpose} needs the package {package!r}, which cannot be imported ({error}); "
            f"install it with: pip install {package}",
            "data",
        ) from error
