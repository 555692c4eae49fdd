"""How many replicas a deployment needs, from what its replicas say of their load.

    autoscaling_config:
      min_replicas: 1
      max_replicas: 8
      policy:
        policy_function: deploy.autoscaling:LoadPolicy
        policy_kwargs: {targets: {tokens: 16384, kv_use: 0.7}}

Requests say little of the load of a language model: one may be a thousand times another. So LM
replicas report `tokens` (still to be computed for all their requests) and `kv_use` (share of the KV
cache in use), generators report `misses` (updates being generated, or waiting to be). Delays,
factors and bounds are Serve's own. Serve pickles this module by value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

METRICS = ("tokens", "kv_use", "misses")


class Context(Protocol):
    """What is read of Serve's AutoscalingContext (an alpha API, read in Ray 2.60)."""

    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None
    policy_state: dict[str, Any]


class LoadPolicy:
    """As many replicas as bring each metric to its target, whichever needs most.

    Args:
        targets: by metric, what one replica should have of it.

    Raises:
        ValueError: a metric that no replica reports, or a target that is not positive.
    """

    def __init__(self, targets: Mapping[str, float]) -> None:
        for name, target in targets.items():
            if name not in METRICS:
                raise ValueError(f"targets: there is no {name!r}; there are {', '.join(METRICS)}")
            if not (target > 0 and math.isfinite(target)):
                raise ValueError(f"targets: {name} must be positive, got {target}")
        if not targets:
            raise ValueError("targets: name at least one metric")
        self._targets = dict(targets)

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """Replicas wanted, before delays and bounds; no replica reporting, one."""
        reported = context.aggregated_metrics or {}
        needed = [
            sum(reported.get(name, {}).values()) / target for name, target in self._targets.items()
        ]
        return max(1.0, *needed), dict(context.policy_state)
