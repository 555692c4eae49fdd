"""Every metric that the service exports, in one table; and what records them.

Prometheus scrapes them from Ray's metrics port of each node. There a name begins with `ray_`, a
counter's ends with `_total`, and the labels `application`, `deployment` and `replica` are added.
The reference page, the dashboard's test and the meters are all made from the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from ray.serve import metrics

Kind = Literal["counter", "gauge", "histogram"]
Owner = Literal[
    "ClusterRouter", "LMReplica", "AdapterGenerator", "CentroidLearner", "ClusterRefinery"
]

PREFIX = "chameleon_"
NONE = "(none)"
"""Label of requests that name no namespace, or that no cluster was chosen for."""
OTHER = "(other)"
"""Label of clusters beyond those that have labels of their own."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_COSINES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_WHO = ("namespace", "cluster")


class Metric(NamedTuple):
    """One row of the table. `name` is without prefix, `unit` empty for plain counts."""

    owner: Owner
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    bounds: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """Its name where it is scraped; a histogram's comes with `_bucket`, `_sum`, `_count`."""
        return f"ray_{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")


METRICS: tuple[Metric, ...] = (
    Metric("ClusterRouter", "requests", "counter", "Streams that ended, by what their answers ran "
           "under: cluster, static or off.", (*_WHO, "mode")),
    Metric("ClusterRouter", "fallbacks", "counter", "Of these, answers that ran under the static "
           "update because their own could not be had in time.", _WHO),
    Metric("ClusterRouter", "errors", "counter", "Streams that failed and requests refused before "
           "there was one, by the error's code; cancelled is a caller who left.", ("code",)),
    Metric("ClusterRouter", "prompt_tokens", "counter", "Tokens of prompts.", _WHO, "tokens"),
    Metric("ClusterRouter", "cached_tokens", "counter", "Of these, tokens that a prefix cache "
           "held.", _WHO, "tokens"),
    Metric("ClusterRouter", "output_tokens", "counter", "Tokens of answers, counted when a stream "
           "ends.", _WHO, "tokens"),
    Metric("ClusterRouter", "first_token_seconds", "histogram", "From the call until the "
           "router has the first token, whether it streams it or sends the answer whole.",
           ("mode",), "seconds", _SECONDS),
    Metric("ClusterRouter", "token_gap_seconds", "histogram", "Mean time between the tokens of an "
           "answer after its first, as the router has them.", ("mode",), "seconds", _GAPS),
    Metric("ClusterRouter", "longest_gap_seconds", "histogram", "Longest time between two chunks "
           "of an answer, likewise; tokens that share one count once.", ("mode",),
           "seconds", _GAPS),
    Metric("ClusterRouter", "request_seconds", "histogram", "From the call to the end of a stream.",
           ("mode",), "seconds", _SECONDS),
    Metric("ClusterRouter", "similarity", "histogram", "Cosine of a prompt's embedding to the "
           "nearest centroid.", ("mode",), "", _COSINES),
    Metric("ClusterRouter", "streams_in_flight", "gauge", "Streams that run now."),
    Metric("ClusterRouter", "conditioning_gain_nats", "gauge", "By how much a cluster's own update "
           "predicts its prompts better than the static one: mean of the latest estimates.", _WHO,
           "nats per token"),
    Metric("ClusterRouter", "conditioning_gain_estimates", "counter", "How many estimates there "
           "were.", _WHO),
    Metric("ClusterRouter", "handed_on", "counter", "Prompts' embeddings (receiver learner) and "
           "prompts (receiver refinery) sent, lost on a receiver that was down, or dropped for "
           "newer ones.", ("receiver", "outcome")),
    Metric("LMReplica", "running_requests", "gauge", "Requests in the engine's batch."),
    Metric("LMReplica", "waiting_requests", "gauge", "Requests in its queues."),
    Metric("LMReplica", "tokens_ahead", "gauge", "Tokens of all these that are not computed yet, "
           "answers at their longest.", (), "tokens"),
    Metric("LMReplica", "kv_cache_use", "gauge", "Share of the KV cache that running requests use.",
           (), "0 to 1"),
    Metric("LMReplica", "engine_prompt_tokens", "counter", "Tokens of admitted prompts.", (),
           "tokens"),
    Metric("LMReplica", "engine_cached_tokens", "counter", "Of these, tokens that the prefix cache "
           "held.", (), "tokens"),
    Metric("LMReplica", "engine_generated_tokens", "counter", "Tokens generated, as they are.", (),
           "tokens"),
    Metric("LMReplica", "preemptions", "counter", "Requests that had to make room and start "
           "over."),
    Metric("LMReplica", "adapters_resident", "gauge", "Updates on the device."),
    Metric("LMReplica", "adapter_loads", "counter", "Updates brought to the device."),
    Metric("LMReplica", "adapter_evictions", "counter", "Of these, those that pushed out "
           "another."),
    Metric("AdapterGenerator", "updates_generated", "counter", "Updates generated."),
    Metric("AdapterGenerator", "update_seconds", "counter", "Time that generating them took, "
           "queueing included.", (), "seconds"),
    Metric("AdapterGenerator", "update_failures", "counter", "Updates that could not be "
           "generated."),
    Metric("AdapterGenerator", "update_requests", "counter", "Updates asked for: hit in the cache, "
           "or miss.", ("outcome",)),
    Metric("AdapterGenerator", "updates_in_flight", "gauge", "Updates being generated, or waiting "
           "to be."),
    Metric("AdapterGenerator", "updates_cached", "gauge", "Updates in the cache."),
    Metric("AdapterGenerator", "update_cache_bytes", "gauge", "What they take.", (), "bytes"),
    Metric("CentroidLearner", "clusters", "gauge", "Clusters, of namespaces that have learned "
           "since the start.", ("namespace",)),
    Metric("CentroidLearner", "embeddings_learned", "counter", "Prompts learned from."),
    Metric("CentroidLearner", "embeddings_refused", "counter", "Prompts that could not be learned "
           "from; the log says why."),
    Metric("CentroidLearner", "snapshot_version", "gauge", "Version of the clusters published "
           "last.", ("namespace",)),
    Metric("CentroidLearner", "snapshot_age_seconds", "gauge", "Since that version was published.",
           ("namespace",), "seconds"),
    Metric("CentroidLearner", "publish_failing", "gauge", "Namespaces that cannot be published at "
           "this moment."),
    Metric("ClusterRefinery", "prompts_offered", "counter", "Prompts that it was given."),
    Metric("ClusterRefinery", "refinements", "counter", "Refinements by outcome: refined, "
           "unchanged (nothing was gained) or failed.", ("outcome",)),
)  # fmt: skip


@dataclass(frozen=True)
class Meters:
    """The metrics of one deployment, under their names in the table.

    Made in its replica: there, Ray Serve adds the labels that tell replicas apart.
    """

    owner: Owner

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {one.name: _make(one) for one in METRICS if one.owner == self.owner}

    @cached_property
    def _totals(self) -> dict[tuple[str, tuple[str, ...]], float]:
        return {}

    def count(self, name: str, amount: float, labels: Mapping[str, str] | None = None) -> None:
        """Add to a counter."""
        if amount > 0:
            self._made[name].inc(amount, dict(labels or {}))

    def total(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """Bring a counter up to `value`, which only grows."""
        labels = labels or {}
        place = name, tuple(labels.values())
        self.count(name, value - self._totals.get(place, 0), labels)
        self._totals[place] = value

    def set(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """Set a gauge."""
        self._made[name].set(value, dict(labels or {}))

    def observe(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """Add to a histogram."""
        self._made[name].observe(value, dict(labels or {}))


def _make(metric: Metric) -> Any:
    name = PREFIX + metric.name
    if metric.kind == "histogram":
        return metrics.Histogram(name, metric.help, list(metric.bounds), metric.labels)
    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(name, metric.help, metric.labels)
