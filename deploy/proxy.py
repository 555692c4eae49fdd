"""Puts `cluster_router/openai/front.py` into Serve's HTTP proxies (see `deploy/environment.py`)."""

from __future__ import annotations

from starlette.middleware import Middleware

from cluster_router.openai.front import Front


def middlewares() -> list[Middleware]:
    """Called by each proxy as it starts."""
    return [Middleware(Front)]
