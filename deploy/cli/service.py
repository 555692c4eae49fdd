"""A running service, as the commands that talk to one see it."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from cluster_router.wire.errors import EngineError, RequestError, UnavailableError

Url = Annotated[
    str, typer.Option(envvar="CHAMELEON_URL", help="Where the service is, without /v1.")
]
Key = Annotated[
    str | None,
    typer.Option(envvar="CHAMELEON_API_KEY", help="API key, where the service asks for one."),
]
Tenant = Annotated[str | None, typer.Option(help="Namespace whose clusters are used.")]

LOCAL = "http://127.0.0.1:8000"
_TIMEOUT_S = 600.0


def headers_of(key: str | None) -> dict[str, str]:
    """Headers that every request carries."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class Service:
    """Calls one service, and turns what goes wrong into errors that name what to change.

    Args:
        url: where it is.
        key: API key.
    """

    def __init__(self, url: str, key: str | None) -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.url, headers=headers_of(key), timeout=httpx.Timeout(_TIMEOUT_S, connect=5)
        )

    def get(self, path: str, **query: str | int | None) -> Any:
        """The JSON at `path`."""
        given = {name: value for name, value in query.items() if value is not None}
        with reached(self.url):
            answer = self._http.get(path, params=given)
            check(answer.status_code, answer.read())
        return answer.json()

    def model(self) -> str:
        """Name of the served model."""
        return str(self.get("/v1/models")["data"][0]["id"])

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a streamed answer. Closing the iterator cancels the request."""
        with reached(self.url), self._http.stream("POST", path, json=body) as answer:
            if answer.is_error:
                check(answer.status_code, answer.read())
            for line in answer.iter_lines():
                if (event := event_of(line)) is not None:
                    yield event


@contextmanager
def reached(url: str) -> Iterator[None]:
    """Say what to do when the service at `url` cannot be reached.

    Raises:
        UnavailableError: it cannot, or the connection broke.
        RequestError: `url` is none.
    """
    import httpx

    try:
        yield
    except httpx.ConnectError:
        raise UnavailableError(
            f"nothing answers at {url}; start it with `chameleon serve`, or name another place "
            "with --url or CHAMELEON_URL"
        ) from None
    except (httpx.UnsupportedProtocol, httpx.InvalidURL):
        raise RequestError(f"{url!r} is no URL; give one such as {LOCAL}", "url") from None
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"the connection to {url} broke ({type(error).__name__}); send the request again"
        ) from error


def check(status: int, body: bytes) -> None:
    """Raise the error that an answer holds, if it is one.

    Raises:
        RequestError: the request has to change.
        EngineError: the service failed, or is too busy.
    """
    if status < 400:
        return
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace") or "no message; is it a ChameleonLLM there?"
    if status == 401:
        message += " Give one with --key or CHAMELEON_API_KEY."
    if status in {429, 503} or status >= 500:
        raise EngineError(f"{status}: {message}")
    raise RequestError(f"{status}: {message}")


def event_of(line: str) -> dict[str, Any] | None:
    """The JSON of one line of a stream of events; None for any other line.

    Raises:
        EngineError: it is an error, sent after the answer had begun.
    """
    if not line.startswith("data: ") or line == "data: [DONE]":
        return None
    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise EngineError(event["error"]["message"])
    return event
