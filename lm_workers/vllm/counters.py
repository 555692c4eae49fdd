"""What vLLM tells of itself after every step."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase


class Counters(StatLoggerBase):
    """Keeps the latest figures.

    Attributes:
        kv_use: share of the KV cache in use.
        preemptions: how often a request had to make room and start over.
    """

    def __init__(self) -> None:
        self.kv_use = 0.0
        self.preemptions = 0

    def made_for(self, _: VllmConfig, __: int = 0) -> Counters:
        """Itself, as vLLM asks a factory for one."""
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        **_: Any,
    ) -> None:
        """Called by vLLM."""
        if scheduler_stats is not None:
            self.kv_use = float(scheduler_stats.kv_cache_usage)
        if iteration_stats is not None:
            self.preemptions += int(iteration_stats.num_preempted_reqs)

    def log_engine_initialized(self) -> None:
        """Nothing to log."""
