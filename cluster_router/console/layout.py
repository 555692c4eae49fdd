"""ClusterMap: where clusters lie on a plane, the same way every time they are looked at."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster_router.wire.types import FloatArray

Points = NDArray[np.float64]

_MOST_LANDMARKS = 256
"""More are not laid out: the cost grows with their square and worse."""

_ROUNDS = 200
_PLACING_ROUNDS = 40
_NEAR = 1e-3  # squared distance under which a landmark all but decides where a centroid lies


class ClusterMap:
    """A plane on which distances are those of embeddings, as far as two dimensions can.

    At most 256 centroids that never change are laid out once (multidimensional scaling by
    majorisation, as in de Leeuw, "Applications of convex analysis to multidimensional scaling",
    1977); any other is placed among them by its distances to them alone. So a point moves when its
    own centroid does, whatever other clusters come and go, and every router draws the same map.

    Args:
        landmarks: [K, d], the centroids to lay out; of more than 256, as many of them, evenly.
        mean: [d], what all traffic has in common; directions are counted from there.
    """

    def __init__(self, landmarks: FloatArray, mean: FloatArray) -> None:
        self._mean = mean.astype(np.float64)
        count = min(len(landmarks), _MOST_LANDMARKS)
        chosen = np.linspace(0, len(landmarks) - 1, count).round().astype(np.int64)
        self._landmarks = self._directions(landmarks[chosen])
        distances = _distances(self._landmarks, self._landmarks)
        self._points = _laid_out(distances)
        self._scale = _scale(self._points, distances)

    def place(self, centroids: FloatArray) -> Points:
        """Coordinates of `centroids` [K, d] within the unit disc or close to it, [K, 2]."""
        if not len(self._landmarks):
            return np.zeros((len(centroids), 2))
        distances = _distances(self._directions(centroids), self._landmarks)  # [K, landmarks]
        weights = 1 / (distances**2 + _NEAR)
        weights /= weights.sum(1, keepdims=True)
        points = weights @ self._points
        for _ in range(_PLACING_ROUNDS):
            points = _step(points, self._points, self._scale * distances, weights)
        return points

    def _directions(self, centroids: FloatArray) -> Points:
        offsets = centroids.astype(np.float64) - self._mean
        return offsets / np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True), 1e-9)


def _distances(rows: Points, others: Points) -> Points:
    """Chords between unit vectors, [rows, others]."""
    return np.sqrt(np.maximum(0.0, 2 - 2 * rows @ others.T))


def _laid_out(distances: Points) -> Points:
    """Points [K, 2] whose distances come as near as may be to `distances` [K, K]."""
    count = len(distances)
    if not count:
        return np.zeros((0, 2))
    points = _principal(distances)
    weights = np.full((count, count), 1 / count)
    for _ in range(_ROUNDS):
        points = _step(points, points, distances, weights)
        points -= points.mean(0)
    return points / max(np.linalg.norm(points, axis=1).max(), 1e-9)


def _principal(distances: Points) -> Points:
    """Classical scaling: where majorisation starts from. Signs are fixed, as no library's are."""
    count = len(distances)
    centring = np.eye(count) - 1 / count
    values, vectors = np.linalg.eigh(-0.5 * centring @ distances**2 @ centring)
    axes = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0))
    points = np.zeros((count, 2))
    for column, axis in enumerate(axes.T):
        points[:, column] = axis * np.sign(axis[np.abs(axis).argmax()] or 1)
    return points


def _scale(points: Points, distances: Points) -> float:
    """What distances are multiplied by on the plane, in the least squares sense."""
    return float((_between(points) * distances).sum() / max((distances**2).sum(), 1e-9))


def _between(points: Points) -> Points:
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def _step(points: Points, landmarks: Points, distances: Points, weights: Points) -> Points:
    """Each point moves to where the landmarks, each at its own distance, want it on average."""
    offsets = points[:, None] - landmarks[None]  # [K, landmarks, 2]
    lengths = np.maximum(np.linalg.norm(offsets, axis=2), 1e-9)
    wanted = landmarks[None] + offsets * (distances / lengths)[..., None]
    return np.einsum("kl,klx->kx", weights, wanted)
