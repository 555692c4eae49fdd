"""The console over HTTP: a page, its files, and the figures it shows."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from cluster_router.console.view import Viewer
from cluster_router.openai.common import NAMESPACE
from cluster_router.openai.guard import caller_of
from cluster_router.openai.service import ServiceSource
from cluster_router.wire.errors import ForbiddenError
from cluster_router.wire.types import DEFAULT_NAMESPACE, Namespace

ConsoleState = Callable[[Viewer], Awaitable[dict[str, Any]]]
"""What a StatusBoard shows a viewer, as `view.state_of` lays it out. May raise UnavailableError."""

_STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page, as it is and compressed."""

    body: bytes
    gzipped: bytes
    etag: str
    media_type: str

    @classmethod
    def read(cls, path: Path) -> Asset:
        """The file at `path`."""
        body = path.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        return cls(body, gzip.compress(body, mtime=0), etag, _TYPES[path.suffix])

    def response(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        headers = _HEADERS | {"ETag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers |= {"Content-Encoding": "gzip"}
            return Response(self.gzipped, headers=headers, media_type=self.media_type)
        return Response(self.body, headers=headers, media_type=self.media_type)


ASSETS = {
    "/" if path.name == "index.html" else f"/console/{path.name}": Asset.read(path)
    for path in sorted(_STATIC.iterdir())
}
"""The page's files by path. They hold nothing of the service, and need no key."""


def console_routes(service: ServiceSource, state: ConsoleState) -> APIRouter:
    """The page at `/` and what it asks for.

    Args:
        service: gives the service.
        state: gives its figures.
    """
    router = APIRouter(tags=["console"])
    for path, asset in ASSETS.items():
        router.add_api_route(path, asset.response, include_in_schema=False, response_model=None)

    @router.get("/console/state", response_model=None, summary="What the console shows")
    async def get_state(
        request: Request,
        namespace: Annotated[Namespace, Query(description=NAMESPACE)] = DEFAULT_NAMESPACE,
        every: Annotated[bool, Query(alias="all", description="Every namespace at once.")] = False,
        cluster: Annotated[int | None, Query(ge=0, description="Show it in detail.")] = None,
    ) -> Response:
        caller = caller_of(request)
        if every and caller.namespace is not None:
            raise ForbiddenError(
                f"This API key speaks for namespace {caller.namespace!r} only; leave all out.",
                "all",
            )
        viewer = Viewer(
            namespace=None if every else caller.tenant(namespace),
            bound=caller.namespace is not None,
            cluster=cluster,
        )
        model = service().model
        shown = {"name": model.name, "context_length": model.context_length}
        return JSONResponse(
            {"model": shown, **await state(viewer)}, headers={"Cache-Control": "no-store"}
        )

    return router
