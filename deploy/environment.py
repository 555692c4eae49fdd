"""What Serve's own processes are started with; not for others, whose handles work without a loop.

    controller_options:
      runtime_env:
        env_vars: {...}

in Serve's config: proxies and replicas inherit the controller's environment. `chameleon serve` does
it by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

FRONT = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Names what stands before the routers in Serve's proxies; empty switches it off."""

GRPC = "RAY_SERVE_USE_GRPC_BY_DEFAULT"
"""Whether calls between replicas are gRPC messages; who binds an application says so, too."""

SETTINGS: Mapping[str, str] = {
    FRONT: "deploy.proxy:middlewares",
    # Each token passes from LM replica to router to proxy. As gRPC messages, and within one event
    # loop a process, that costs less than half of what it does through Ray's objects and threads.
    GRPC: "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A body, a prompt's log-probabilities or an exported adapter may be longer than gRPC's 4 MiB.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "-1",
    # Serve looks every 0.1 s whether there is anything to change, which on two cores is felt.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
}
"""Environment variables of Serve's controller, and so of all that it starts."""
