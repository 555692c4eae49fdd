"""What the API is given: a way to reach the service, and to ask whether it is ready."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster_router.router import ClusterRouter

ServiceSource = Callable[[], "ClusterRouter"]
"""Gives the service at request time: an app is built before its replica's service exists."""

Readiness = Callable[[], Awaitable[str | None]]
"""None when requests can be served, otherwise the reason why not."""
