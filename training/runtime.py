"""Where a stage runs: this process, or (see `training.ray_train`) one of several workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from cluster_router.wire.errors import SetupError
from training.checkpoints import Saved, StageFiles


class Runtime(Protocol):
    """What a stage asks of the place it runs in."""

    @property
    def rank(self) -> int:
        """Which worker this is; 0 shows progress."""
        ...

    @property
    def world(self) -> int:
        """How many workers there are."""
        ...

    @property
    def device(self) -> torch.device:
        """What this worker computes on."""
        ...

    @property
    def checkpoints(self) -> Path | None:
        """Where checkpoints go, for messages; None where none are kept."""
        ...

    def prepare(self, module: nn.Module) -> nn.Module:
        """`module` on the device, wrapped so that its gradients are the mean over all workers."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """The sum of `value` over all workers. Every worker has to come here."""
        ...

    def load(self, stage: str) -> Saved | None:
        """Where `stage` stands, the same in every worker; None where it has not begun."""
        ...

    def save(self, stage: str, saved: Saved, metrics: Mapping[str, float]) -> None:
        """Keep where `stage` stands. Every worker has to come here; the first one's is kept."""
        ...


class InProcess:
    """A single worker: this process, on its GPU where there is one.

    Args:
        folder: where checkpoints are kept; None keeps none.
    """

    rank = 0
    world = 1

    def __init__(self, folder: Path | None = None) -> None:
        self.checkpoints = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._files = None if folder is None else StageFiles(folder)

    def prepare(self, module: nn.Module) -> nn.Module:
        """See `Runtime.prepare`."""
        return module.to(self.device)

    def total(self, value: Tensor) -> Tensor:
        """See `Runtime.total`."""
        return value

    def load(self, stage: str) -> Saved | None:
        """See `Runtime.load`."""
        return None if self._files is None else self._files.load(stage)

    def save(self, stage: str, saved: Saved, _metrics: Mapping[str, float]) -> None:
        """See `Runtime.save`.

        Raises:
            SetupError: the folder cannot be written, for instance because the disk is full.
        """
        if self._files is None:
            return
        try:
            self._files.save(stage, saved)
        except OSError as error:
            raise SetupError(
                f"cannot write a checkpoint to {self._files.folder}: {error}; "
                "free some space and go on with --resume"
            ) from error
