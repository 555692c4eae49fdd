"""Global batches divided over workers and micro-batches.

A global batch is a function of the run's seed, the stage and the step alone. Each worker draws the
whole of it and reads its own share, so a run gives the same curve in any number of workers, and
one that is interrupted goes on exactly.
"""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from accelerate.utils import send_to_device

from cluster_router.wire.errors import ConfigError

B = TypeVar("B")


@dataclass(frozen=True)
class Split:
    """Which shares of a global batch are this worker's.

    Attributes:
        rank: which worker this is.
        world: how many workers there are.
        accumulate: shares of each worker, whose gradients add up to one step.
    """

    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def rows(self, documents: int) -> list[range]:
        """The documents of each of this worker's shares, of `documents` in the global batch.

        Raises:
            ConfigError: there are fewer documents than shares.
        """
        shares = self.world * self.accumulate
        if documents < shares:
            raise ConfigError(
                f"a batch of {documents} documents cannot be divided over {self.world} workers "
                f"times {self.accumulate}; raise documents or lower workers or accumulate",
                "documents",
            )
        first = self.rank * self.accumulate
        bounds = [documents * share // shares for share in range(shares + 1)]
        return [range(bounds[i], bounds[i + 1]) for i in range(first, first + self.accumulate)]


@dataclass(frozen=True, eq=False)
class Share(Generic[B]):
    """A part of a global batch.

    Attributes:
        batch: what the module is given.
        all_tokens: scored tokens of the global batch.
        of_tokens: the part of those that is in `batch`.
        of_documents: the part of the global batch's documents that is in `batch`.
        seed: of whatever is random inside the module.
    """

    batch: B
    all_tokens: int
    of_tokens: float
    of_documents: float
    seed: int


class Batches(Protocol[B]):
    """A source of global batches."""

    def draw(self, step: int, split: Split) -> list[Share[B]]:
        """The shares of step `step` (from 1) that `split` asks for."""
        ...


@dataclass(frozen=True)
class Seed:
    """Randomness of one stage, by step."""

    run: int
    stage: str

    def generator(self, step: int) -> np.random.Generator:
        """The generator of one step, the same in every worker."""
        return np.random.default_rng(self._sequence(step))

    def number(self, step: int, first_row: int = 0) -> int:
        """A seed below 2^31 for the share of one step that begins with document `first_row`."""
        return int(self._sequence(step, first_row + 1).generate_state(1)[0] >> 1)

    def _sequence(self, *parts: int) -> np.random.SeedSequence:
        return np.random.SeedSequence([self.run, zlib.crc32(self.stage.encode()), *parts])


def to_device(value: Any, device: torch.device) -> Any:
    """A copy of `value` (a dataclass, or what Accelerate can move) with its tensors on `device`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        moved = {name: to_device(getattr(value, name), device) for name in names}
        return dataclasses.replace(value, **moved)
    return send_to_device(value, device)
