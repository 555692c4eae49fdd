"""Puts `cluster_router/openai/front.py` into Serve's HTTP proxies.

    controller_options:
      runtime_env:
        env_vars: {RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: deploy.proxy:middlewares}

in Serve's config: proxies inherit the controller's environment. `chameleon serve` does it by
itself.
"""

from __future__ import annotations

from starlette.middleware import Middleware

from cluster_router.openai.front import Front

SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""The environment variable."""

CALLBACK = "deploy.proxy:middlewares"
"""Its value."""


def middlewares() -> list[Middleware]:
    """Called by each proxy as it starts."""
    return [Middleware(Front)]
