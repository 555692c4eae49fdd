"""Updates that documents are scored under, named by all that they depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from adapter_gen.hypernetwork import Generated
from adapter_gen.update import SharedBases, UpdateSpec
from training.data import Window

Key = str


def digest(*parts: object) -> Key:
    """Thirty-two hex digits that change with any part. Arrays and tensors count by content."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().float().numpy()  # noqa: PLW2901
        if isinstance(part, np.ndarray):
            state.update(f"{part.dtype}{part.shape}".encode())
            state.update(np.ascontiguousarray(part).tobytes())
        else:
            state.update(repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()


def window_key(window: Window) -> Key:
    """Names the tokens of a window and which of them are scored."""
    return digest(window.tokens, window.context)


@dataclass(frozen=True, eq=False)
class Family:
    """Updates that share their bases, so that one pass can run any mix of them.

    `load` gives the bases, None for the unadapted model; it is called when they are needed.
    """

    key: Key
    spec: UpdateSpec
    load: Callable[[], SharedBases | None]

    @classmethod
    def unadapted(cls, spec: UpdateSpec) -> Family:
        """The base model itself."""
        return cls("base", spec, lambda: None)

    @classmethod
    def of(cls, spec: UpdateSpec, bases: SharedBases) -> Family:
        """Named by content: equal bases are one family, whoever holds them."""
        key = digest(spec, *bases.u, *bases.v, bases.s0, bases.shift)
        return cls(key, spec, lambda: bases)


@dataclass(frozen=True, eq=False)
class Update:
    """One update of a family. `make` gives it (B = 1); None is the static update."""

    key: Key
    family: Family
    make: Callable[[], Generated] | None = None

    @classmethod
    def static(cls, family: Family) -> Update:
        """What all of a family share, with nothing generated."""
        return cls(digest(family.key, "static"), family)

    def generated(self) -> Generated:
        """The update; zeros where nothing is generated."""
        return zeros(self.family.spec) if self.make is None else self.make()


@dataclass(frozen=True, eq=False)
class Task:
    """A window to be scored under an update."""

    window: Window
    update: Update

    @property
    def key(self) -> Key:
        """Names all that the loss depends on, but for the base model."""
        return digest(window_key(self.window), self.update.key)


def zeros(spec: UpdateSpec) -> Generated:
    """The update (B = 1) that changes nothing."""
    return Generated(
        cores=torch.zeros(1, len(spec.sites), spec.rank, spec.rank),
        shift=torch.zeros(1, spec.hidden_size),
    )


def stack(updates: Sequence[Generated]) -> Generated:
    """One batch of several updates of a family."""
    return _each(lambda *tensors: torch.cat(tensors), *updates)


def blend(weights: Sequence[float], updates: Sequence[Generated]) -> Generated:
    """The weighted sum of several updates (each B = 1)."""

    def combine(*tensors: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(tensors[0])
        for weight, tensor in zip(weights, tensors, strict=True):
            total += weight * tensor
        return total

    return _each(combine, *updates)


def noise_like(update: Generated, seed: int) -> Generated:
    """A random update (B = 1) in which every core, and the shift, has the norm it has in `update`.

    Args:
        update: what it replaces.
        seed: of the random numbers.
    """
    random = torch.Generator().manual_seed(seed)

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(tensor.shape, generator=random)
        axes = tuple(range(2, tensor.ndim)) or (1,)
        norm, target = (x.square().sum(axes, keepdim=True).sqrt() for x in (drawn, tensor))
        return drawn * (target / norm.clamp_min(1e-12))

    return _each(replace, update)


def _each(change: Callable[..., torch.Tensor], *updates: Generated) -> Generated:
    found = {}
    for field in fields(Generated):
        tensors = [getattr(update, field.name) for update in updates]
        if all(tensor is not None for tensor in tensors):
            found[field.name] = change(*tensors)
    return Generated(**found)
