"""What the page shows: the board's figures for one viewer, as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cluster_router.console.board import Heard, StatusBoard
from cluster_router.console.counts import COSINES, Counts
from cluster_router.console.history import STEP_S, STEPS
from cluster_router.console.reports import ClusterTable
from cluster_router.tally import Key
from cluster_router.traffic import OTHER
from cluster_router.wire.types import DEFAULT_NAMESPACE, ClusterInfo

NOW_S = 10.0
"""What "now" means where rates are shown."""

LATENCY_S = 60.0
RECENT_S = STEP_S * STEPS

_MOST_CLUSTERS = 300
_TOP = 6


@dataclass(frozen=True, slots=True)
class Viewer:
    """Whose eyes the figures are for.

    Attributes:
        namespace: the one to show; None is all of them.
        bound: the viewer may see no other, nor what all tenants together do.
        cluster: the one to show in detail.
    """

    namespace: str | None = DEFAULT_NAMESPACE
    bound: bool = False
    cluster: int | None = None

    def sees(self, key: Key) -> bool:
        """Whether traffic of `key` is shown."""
        if key == OTHER and self.bound:
            return False  # of any tenant
        return self.namespace is None or key.namespace == self.namespace


def state_of(board: StatusBoard, viewer: Viewer) -> dict[str, Any]:
    """Everything the page shows but the model's name. Rates are per second, times Unix time."""
    return View(board, viewer).state()


class View:
    """The figures of one moment."""

    def __init__(self, board: StatusBoard, viewer: Viewer) -> None:
        self._board, self._viewer = board, viewer
        self._now = board.clock()
        self._lately = board.history.by_key(self._now, RECENT_S, viewer.sees)
        self._at_once = board.history.by_key(self._now, NOW_S, viewer.sees)
        self._covered = board.history.covered(self._now, NOW_S)

    def state(self) -> dict[str, Any]:
        """See `state_of`."""
        viewer, history = self._viewer, self._board.history
        return {
            "object": "console.state",
            "now": round(self._board.wall(), 3),
            "since": round(self._board.started, 3),
            "step_s": STEP_S,
            "namespace": viewer.namespace,
            "namespaces": self._namespaces(),
            "totals": self._totals(),
            "series": _series(history.steps(self._now, viewer.sees)),
            "clusters": self._clusters(),
            "top": self._top(),
            "replicas": None if viewer.bound else self._replicas(),
            "cluster": None if viewer.cluster is None else self._detail(viewer.cluster),
        }

    def _namespaces(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "clusters": len(table.clusters), "version": table.version}
            for name, table in sorted(self._board.tables.items())
            if not self._viewer.bound or name == self._viewer.namespace
        ]

    def _totals(self) -> dict[str, Any]:
        latency = self._board.history.window(self._now, LATENCY_S, self._viewer.sees)
        recent = Counts.of(counts.numbers for counts in self._lately.values())
        return {
            **self._rates(Counts.of(counts.numbers for counts in self._at_once.values())),
            "first_token_s": [_rounded(latency.first_token_s(share)) for share in (0.5, 0.95)],
            "modes": recent.modes,
            "requests_recent": recent.requests,
            "errors_recent": recent.errors,
            "cached_share": _share(recent.cached_tokens, recent.prompt_tokens),
        }

    def _rates(self, counts: Counts) -> dict[str, float]:
        return {
            "requests": round(counts.requests / self._covered, 3),
            "prompt_tokens": round(counts.prompt_tokens / self._covered, 2),
            "output_tokens": round(counts.output_tokens / self._covered, 2),
        }

    def _shown(self) -> list[tuple[ClusterTable, int]]:
        """Tables and rows of the clusters shown, the largest first.

        Every tenant begins with the same clusters. Where all are shown, those without traffic would
        only repeat the default ones, and are left out.
        """
        chosen = self._viewer.namespace
        found = [
            (table, row)
            for name, table in self._board.tables.items()
            if chosen in (None, name)
            for row, one in enumerate(table.clusters)
            if name in (chosen, DEFAULT_NAMESPACE) or Key(name, one.id) in self._lately
        ]
        found.sort(key=lambda item: item[0].clusters[item[1]].size, reverse=True)
        return found[:_MOST_CLUSTERS]

    def _clusters(self) -> list[dict[str, Any]]:
        shown = []
        for table, row in self._shown():
            x, y = table.points[row].tolist()
            cluster = self._cluster(table.namespace, table.clusters[row])
            shown.append({**cluster, "x": round(x, 4), "y": round(y, 4)})
        return shown

    def _cluster(self, namespace: str, one: ClusterInfo) -> dict[str, Any]:
        key = Key(namespace, one.id)
        recent = self._lately.get(key, Counts.of(()))
        return {
            **asdict(one),
            "namespace": namespace,
            "since": self._board.known(namespace, one.id).since,
            **self._rates(self._at_once.get(key, Counts.of(()))),
            "requests_recent": recent.requests,
            "similarity": _rounded(recent.similarity(0.5)),
        }

    def _top(self) -> list[dict[str, Any]]:
        """The clusters with most answers' tokens lately, and their tokens per second over time."""
        ranked = sorted(self._lately.items(), key=lambda item: -item[1].output_tokens)
        return [
            {
                "namespace": key.namespace,
                "id": key.cluster,
                "output_tokens": [
                    round(step.output_tokens / STEP_S, 2)
                    for step in self._board.history.steps(self._now, key.__eq__)
                ],
            }
            for key, counts in ranked[:_TOP]
            if counts.output_tokens
        ]

    def _replicas(self) -> dict[str, Any]:
        clock, board = self._now, self._board

        def told(one: Heard[Any]) -> dict[str, Any]:
            return {**asdict(one.place), "age_s": round(clock - one.at, 1), **asdict(one.report)}

        return {
            "routers": [
                {
                    **asdict(one.place),
                    "age_s": round(clock - one.at, 1),
                    "in_flight": one.report.served.in_flight,
                    "requests": round(one.report.served.rate.requests, 3),
                }
                for one in board.routers
            ],
            "engines": [told(one) for one in board.engines],
            "generators": [told(one) for one in board.generators],
            "learners": [told(one) for one in board.learners],
        }

    def _detail(self, cluster: int) -> dict[str, Any] | None:
        """A cluster in detail; None if it is not there, or no longer."""
        for name, table in self._board.tables.items():
            if self._viewer.namespace not in (None, name):
                continue
            one = next((one for one in table.clusters if one.id == cluster), None)
            if one is not None:
                return self._described(name, one)
        return None

    def _described(self, namespace: str, one: ClusterInfo) -> dict[str, Any]:
        key = Key(namespace, one.id)
        recent = self._lately.get(key, Counts.of(()))
        return {
            **self._cluster(namespace, one),
            "series": _series(self._board.history.steps(self._now, key.__eq__)),
            "sizes": [list(pair) for pair in self._board.known(namespace, one.id).sizes],
            "similarities": {
                "from": [round(float(bound - 0.01), 2) for bound in COSINES],
                "counts": recent.similarities.astype(int).tolist(),
                "quantiles": [_rounded(recent.similarity(share)) for share in (0.05, 0.5, 0.95)],
            },
            "first_token_s": [_rounded(recent.first_token_s(share)) for share in (0.5, 0.95)],
            "cached_share": _share(recent.cached_tokens, recent.prompt_tokens),
        }


def _series(steps: list[Counts]) -> dict[str, list[float | None]]:
    """Rates per second and latencies in seconds, a value for each step, oldest first."""
    return {
        "requests": [round(one.requests / STEP_S, 3) for one in steps],
        "prompt_tokens": [round(one.prompt_tokens / STEP_S, 2) for one in steps],
        "cached_tokens": [round(one.cached_tokens / STEP_S, 2) for one in steps],
        "output_tokens": [round(one.output_tokens / STEP_S, 2) for one in steps],
        "first_token_p50": [_rounded(one.first_token_s(0.5)) for one in steps],
        "first_token_p95": [_rounded(one.first_token_s(0.95)) for one in steps],
    }


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
