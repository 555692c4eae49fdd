"""Where a model computes."""

from __future__ import annotations

import torch

from cluster_router.wire.errors import ConfigError


def pick_device(name: str) -> str:
    """The device that a setting names.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} asked for, but torch {torch.__version__} sees no CUDA device; "
            "install the `gpu` extra and a driver, or set device to cpu",
            "device",
        )
    return name
