"""The update that adapts the frozen model, and the parts of it that all clusters share.

For an adapted linear layer y = W x the update is a generated core between two shared bases:

    y = W x + U (S0 + g dS(c)) V x        U [out, r], V [r, in], S0 [r, r] shared; dS(c) generated

and on the final hidden state h, before the LM head:

    h' = h + g s(c) + U_h (S0_h + g dS_h(c)) V_h h + s0

`g = n / (n + kappa)` shrinks a cluster with thin support n towards the static update (g = 0).
The paper's own form (arXiv 2502.04315) generates both factors of the LM head instead:

    logits = W h + (alpha / r) B(c) A(c) h
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cluster_router.wire.errors import DeltaError
from cluster_router.wire.types import AdapterKey

HEAD = "head"
"""Name of the site on the final hidden state; every `head` and `full` spec ends with it."""

Depth = Literal["head", "full", "paper"]
HalfArray = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the model where the update acts.

    `name` is the linear's module path in the transformers model (`model.layers.0.mlp.up_proj`),
    or `"head"` for the final hidden state, where both sizes are the hidden size.
    """

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class UpdateSpec:
    """Shape of an update: which sites, at which rank.

    `paper` has one site, the LM head (in = hidden, out = vocabulary), and no shared bases.
    """

    depth: Depth
    rank: int
    hidden_size: int
    sites: tuple[Site, ...]
    alpha: float = 1.0

    @cached_property
    def head(self) -> int | None:
        """Index of the head site, None for the paper's form."""
        return None if self.depth == "paper" else len(self.sites) - 1

    @property
    def numbers_per_cluster(self) -> int:
        """How many numbers one cluster's update holds."""
        if self.depth == "paper":
            site = self.sites[0]
            return self.rank * (site.in_features + site.out_features)
        return len(self.sites) * self.rank**2 + self.hidden_size


@dataclass(frozen=True)
class SharedBases:
    """What is learned once and shared by every cluster (float32, on the CPU).

    `u[i]` [out, r] and `v[i]` [r, in] belong to `spec.sites[i]`; `s0` is [sites, r, r]; `shift`
    [hidden] is the static head shift s0. All are empty for the paper's form.
    """

    u: tuple[torch.Tensor, ...]
    v: tuple[torch.Tensor, ...]
    s0: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """The generated update of one cluster, gate already applied.

    `cores` float16 [sites, r, r] is g dS; `shift` float16 [hidden] is g s. The paper's form holds
    `lora_a` float16 [r, in] and `lora_b` float16 [out, r] instead. Unused fields are None.
    A static update has cores and shift of zeros.
    """

    key: AdapterKey
    cores: HalfArray | None = None
    shift: HalfArray | None = None
    lora_a: HalfArray | None = None
    lora_b: HalfArray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.arrays().values())

    def check(self, spec: UpdateSpec) -> None:
        """Raise DeltaError unless shapes and dtypes fit `spec` and every number is finite."""
        for name, shape in _expected_shapes(spec).items():
            array = getattr(self, name)
            if shape is None:
                if array is not None:
                    raise DeltaError(f"{name} must be absent at depth {spec.depth!r}")
                continue
            if array is None or array.shape != shape or array.dtype != np.float16:
                got = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise DeltaError(
                    f"{name} of update {self.key.id} must be float16 {shape}, got {got}"
                )
            if not np.isfinite(array).all():
                raise DeltaError(f"{name} of update {self.key.id} holds NaN or infinity")

    def arrays(self) -> dict[str, HalfArray]:
        """What it holds, by field."""
        fields = {
            "cores": self.cores,
            "shift": self.shift,
            "lora_a": self.lora_a,
            "lora_b": self.lora_b,
        }
        return {name: array for name, array in fields.items() if array is not None}

    @classmethod
    def static(cls, key: AdapterKey, spec: UpdateSpec) -> LoraDelta:
        """The update with nothing generated: what every cluster shares.

        In the paper's form nothing is shared, so the static update changes nothing.
        """
        zeros = {
            name: None if shape is None else np.zeros(shape, np.float16)
            for name, shape in _expected_shapes(spec).items()
        }
        return cls(key=key, **zeros)


def _expected_shapes(spec: UpdateSpec) -> dict[str, tuple[int, ...] | None]:
    if spec.depth == "paper":
        site = spec.sites[0]
        return {
            "cores": None,
            "shift": None,
            "lora_a": (spec.rank, site.in_features),
            "lora_b": (site.out_features, spec.rank),
        }
    return {
        "cores": (len(spec.sites), spec.rank, spec.rank),
        "shift": (spec.hidden_size,),
        "lora_a": None,
        "lora_b": None,
    }
