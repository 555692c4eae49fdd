"""ClusterSnapshot: an immutable, versioned set of centroids and what is known of each cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster_router.wire.errors import BundleError
from cluster_router.wire.types import Conditioning, FloatArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ClusterSnapshot:
    """K clusters at one moment. Routers hold one and swap the reference.

    Attributes:
        version: grows with every published snapshot.
        ids: int64 [K], stable names of the clusters; they outlive re-ordering and are never reused.
        centroids: float32 [K, d], unit length.
        sizes: int64 [K], prompts seen, the support behind each cluster.
        versions: int64 [K], the snapshot version at which each cluster last moved.
        conditioning: float32 [K, c], what the hypernetwork is given.
        mean: float32 [d], mean embedding of all traffic (not unit length).
        threshold: cosine under which a prompt belongs to no cluster.
        centre: float32 [d], the point from which embeddings are looked at, None for the origin.
            Centroids and threshold are of what `project` makes of embeddings.
    """

    version: int
    ids: IntArray
    centroids: FloatArray
    sizes: IntArray
    versions: IntArray
    conditioning: FloatArray
    mean: FloatArray
    threshold: float
    centre: FloatArray | None = None

    def __post_init__(self) -> None:
        count, dim = self.centroids.shape if self.centroids.ndim == 2 else (-1, -1)
        if count < 0 or self.mean.shape != (dim,):
            raise BundleError("snapshot: centroids must be [K, d] and mean [d]")
        if self.centre is not None and self.centre.shape != (dim,):
            raise BundleError("snapshot: centre must be [d]")
        for name in ("ids", "sizes", "versions"):
            if getattr(self, name).shape != (count,):
                raise BundleError(
                    f"snapshot: {name} must have one entry for each of {count} clusters"
                )
        if self.conditioning.ndim != 2 or len(self.conditioning) != count:
            raise BundleError(f"snapshot: conditioning must be [{count}, c]")
        if len(set(self.ids.tolist())) != count:
            raise BundleError("snapshot: cluster ids repeat")
        for name in ("centroids", "conditioning", "mean", "centre"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise BundleError(f"snapshot: {name} holds NaN or infinity")
        if count and np.abs(np.linalg.norm(self.centroids, axis=1) - 1).max() > 1e-3:
            raise BundleError("snapshot: centroids must have unit length")

    @classmethod
    def empty(cls, dim: int) -> ClusterSnapshot:
        """No clusters yet, of embeddings of size `dim`."""
        none = np.zeros(0, np.int64)
        flat = np.zeros((0, dim), np.float32)
        return cls(0, none, flat, none, none, flat, np.zeros(dim, np.float32), threshold=1.0)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dim(self) -> int:
        """Embedding size d."""
        return int(self.centroids.shape[1])

    @property
    def directions(self) -> FloatArray:
        """How each cluster differs from all traffic, float32 [K, d]."""
        return self.centroids - self.mean if self.centre is None else self.centroids

    def project(self, embeddings: FloatArray) -> FloatArray:
        """Unit embeddings [..., d] as they are compared with the centroids, of unit length too."""
        return project(embeddings, self.centre)

    def row(self, cluster: int) -> int | None:
        """Row of the cluster named `cluster`, None if there is none."""
        rows = np.flatnonzero(self.ids == cluster)
        return int(rows[0]) if len(rows) else None

    def conditioning_of(self, row: int) -> Conditioning:
        """What the hypernetwork is given for the cluster in `row`."""
        return Conditioning(vector=self.conditioning[row], support=float(self.sizes[row]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Every field that is not None as an array, for a safetensors file."""
        arrays: dict[str, NDArray[Any]] = {
            "version": np.array([self.version], np.int64),
            "ids": self.ids,
            "centroids": self.centroids,
            "sizes": self.sizes,
            "versions": self.versions,
            "conditioning": self.conditioning,
            "mean": self.mean,
            "threshold": np.array([self.threshold], np.float32),
        }
        return arrays if self.centre is None else arrays | {"centre": self.centre}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> ClusterSnapshot:
        """Inverse of `arrays`.

        Raises:
            BundleError: a field is missing, misshapen or not finite.
        """
        try:
            names = cls.__dataclass_fields__.keys() - {"centre"}
            fields = {name: arrays[name] for name in names}
        except KeyError as missing:
            raise BundleError(f"snapshot: field {missing} is missing") from None
        version, threshold = fields.pop("version"), fields.pop("threshold")
        return cls(
            version=int(version[0]),
            threshold=float(threshold[0]),
            centre=arrays.get("centre"),
            **fields,
        )


def project(embeddings: FloatArray, centre: FloatArray | None) -> FloatArray:
    """Unit embeddings [..., d] as seen from `centre` [d]; as they are where it is None."""
    return embeddings if centre is None else unit(embeddings - centre)


def unit(vectors: FloatArray) -> FloatArray:
    """`vectors` [..., d] scaled to unit length; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled = vectors / np.maximum(norms, np.finfo(np.float32).tiny)
    return np.asarray(scaled, np.float32)
