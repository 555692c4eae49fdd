"""The page and its figures over HTTP: what is open, what is guarded, what headers say."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from cluster_router.access import Access, ApiKey, key_hash
from cluster_router.console.routes import ASSETS
from cluster_router.console.view import Viewer, state_of
from cluster_router.http import build_app
from cluster_router.router import ServedModel
from cluster_router.wire.errors import UnavailableError

KEYS = (
    ApiKey(name="open", sha256=key_hash("open-key")),
    ApiKey(name="bound", sha256=key_hash("bound-key"), namespace="shop"),
)
OPEN = {"Authorization": "Bearer open-key"}
BOUND = {"Authorization": "Bearer bound-key"}


class Served:
    """Of a router, all that the console asks for."""

    model = ServedModel("tiny", 0, 256, 256)


def client(told: Any, access: Access | None = None) -> httpx.AsyncClient:
    async def ready() -> None:
        return None

    async def state(viewer: Viewer) -> dict[str, Any]:
        return state_of(told.board, viewer)

    served: Any = Served()
    app = build_app(lambda: served, ready, access=access, console=state)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture
async def http(told: Any) -> AsyncIterator[httpx.AsyncClient]:
    told.board.hear_table(told.table())
    told.board.hear_table(told.table("shop", sizes={10**9: 100}))
    told.served(told.end(), told.end("shop", 10**9))
    async with client(told) as opened:
        yield opened


@pytest.fixture
async def guarded(told: Any, http: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    async with client(told, Access(lambda: KEYS)) as opened:
        yield opened


@pytest.mark.parametrize("path", sorted(ASSETS))
async def test_files_come_with_a_policy_that_lets_nothing_else_in(
    path: str, guarded: httpx.AsyncClient
) -> None:
    answer = await guarded.get(path)  # without a key
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.content == ASSETS[path].body
    again = await guarded.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content


async def test_files_are_compressed_where_that_is_understood(http: httpx.AsyncClient) -> None:
    packed = await http.get("/console/app.js")
    plain = await http.get("/console/app.js", headers={"Accept-Encoding": "identity"})
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in plain.headers and plain.content == packed.content
    assert gzip.decompress(ASSETS["/console/app.js"].gzipped) == plain.content


def test_the_page_is_small_and_names_no_other_host() -> None:
    assert sum(len(asset.body) for asset in ASSETS.values()) < 66_000
    assert sum(len(asset.gzipped) for asset in ASSETS.values()) < 24_000
    for path, asset in ASSETS.items():
        text = asset.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text and "innerHTML" not in text, path


async def test_the_state(http: httpx.AsyncClient) -> None:
    answer = await http.get("/console/state", params={"cluster": 3})
    state = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert state["model"] == {"name": "tiny", "context_length": 256}
    assert [one["id"] for one in state["clusters"]] == [3, 8]
    assert state["cluster"]["characteristic_tokens"] == ["sql", "select"]
    both = (await http.get("/console/state", params={"all": "true"})).json()
    assert {one["namespace"] for one in both["clusters"]} == {"", "shop"}


@pytest.mark.parametrize("params", [{"cluster": "x"}, {"cluster": -1}, {"namespace": "a\nb"}])
async def test_what_makes_no_sense_is_refused(params: Any, http: httpx.AsyncClient) -> None:
    answer = await http.get("/console/state", params=params)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], [error["param"]]) == ("invalid_request_error", list(params))


async def test_figures_need_a_key(guarded: httpx.AsyncClient) -> None:
    assert (await guarded.get("/console/state")).status_code == 401
    state = (await guarded.get("/console/state", headers=OPEN)).json()
    assert state["replicas"] is not None and len(state["namespaces"]) == 2


async def test_a_bound_key_sees_its_own_namespace_only(guarded: httpx.AsyncClient) -> None:
    state = (await guarded.get("/console/state", headers=BOUND)).json()
    assert state["namespace"] == "shop"
    assert [one["id"] for one in state["clusters"]] == [10**9]
    assert state["replicas"] is None
    for params in ({"namespace": "other"}, {"all": "true"}):
        refused = await guarded.get("/console/state", params=params, headers=BOUND)
        assert refused.status_code == 403
    hidden = await guarded.get("/console/state", params={"cluster": 3}, headers=BOUND)
    assert hidden.json()["cluster"] is None


async def test_without_a_board_the_page_says_so() -> None:
    async def silent(viewer: Viewer) -> dict[str, Any]:
        raise UnavailableError("The console's board does not answer; requests go on.")

    async def ready() -> None:
        return None

    served: Any = Served()
    app = build_app(lambda: served, ready, console=silent)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as http:
        answer = await http.get("/console/state")
    assert answer.status_code == 503
    assert "board does not answer" in answer.json()["error"]["message"]


async def test_a_service_without_a_console_has_no_page() -> None:
    async def ready() -> None:
        return None

    served: Any = Served()
    app = build_app(lambda: served, ready)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://test"
    ) as http:
        assert (await http.get("/")).status_code == 404
        assert (await http.get("/console/state")).status_code == 404
