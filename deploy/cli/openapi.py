"""`chameleon openapi`: the schema of the HTTP API, without a running service."""

from __future__ import annotations

from typing import Any, NoReturn

from deploy.cli.output import print_json


def openapi() -> None:
    """Print the OpenAPI schema of the HTTP API.

    docs/reference/openapi.json is this; a running service has it at /openapi.json.
    """
    print_json(schema())


def schema() -> dict[str, Any]:
    """The schema, with the API key that a service may ask for."""
    from cluster_router.access import Access
    from cluster_router.http import build_app

    def service() -> NoReturn:
        raise AssertionError("only the schema is asked for")

    async def ready() -> str | None:
        return None

    async def state(_: object) -> NoReturn:
        service()

    app = build_app(service, ready, access=Access(lambda: ()), console=state)
    return app.openapi()
