"""Connect to a running service from another Python process on its Ray cluster."""

from __future__ import annotations

import ray
from ray import serve

from cluster_router.client import ChameleonClient, SyncChameleonClient
from cluster_router.wire.errors import UnavailableError

APP = "chameleon"
"""Name of the application in `deploy/config.yaml`."""


def connect(app: str = APP, address: str = "auto") -> ChameleonClient:
    """An asynchronous client of application `app` on the Ray cluster at `address`.

    Raises:
        UnavailableError: no cluster there, or no such application on it.
    """
    return ChameleonClient(_handle(app, address))


def connect_sync(app: str = APP, address: str = "auto") -> SyncChameleonClient:
    """The same for code without an event loop. Raises as `connect` does."""
    return SyncChameleonClient(_handle(app, address))


def _handle(app: str, address: str) -> serve.handle.DeploymentHandle:
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        return serve.get_app_handle(app)
    except (ConnectionError, RuntimeError, ray.serve.exceptions.RayServeException) as error:
        raise UnavailableError(
            f"no application {app!r} on the Ray cluster {address!r}: start it with "
            f"`serve run deploy/config.yaml` ({error})"
        ) from error
