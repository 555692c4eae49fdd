"""The page in a real browser, over a board and keys that are real too, and no service behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from browser import CHROMIUM, chromium, watched
from console_load import opened
from playwright.async_api import Page, Route, expect

from cluster_router.access import Access, ApiKey, key_hash
from cluster_router.console.reports import EngineReport, GeneratorReport, LearnerReport, Place
from cluster_router.console.view import Viewer, state_of
from cluster_router.http import build_app
from cluster_router.router import ServedModel

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (`apt install chromium`, or CHROMIUM=/path/to/it)"
)

KEYS = (
    ApiKey(name="operator", sha256=key_hash("ck-open")),
    ApiKey(name="tenant", sha256=key_hash("ck-bound"), namespace="shop"),
)


@asynccontextmanager
async def served(told: Any, access: Access | None = None) -> AsyncIterator[str]:
    """Its URL, below a prefix as where Serve has several applications."""

    class Router:
        model = ServedModel("tiny", 0, 256, 256)

    async def ready() -> None:
        return None

    async def state(viewer: Viewer) -> dict[str, Any]:
        return state_of(told.board, viewer)

    router: Any = Router()
    app = build_app(lambda: router, ready, access=access, console=state)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    [listening] = server.servers[0].sockets
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        await running


@pytest.fixture(autouse=True)
def board(told: Any) -> None:
    """Two LM replicas, a generator, the learner, and clusters of two tenants."""
    report = EngineReport(3, 1, 900, 1000, 250, 2, 0.4, 5)
    for name in ("lm-1", "lm-2"):
        told.board.hear_engine(Place(name, "10.0.0.2"), report)
    told.board.hear_generator(Place("generator", "10.0.0.1"), GeneratorReport(12, 0, 0, 10))
    told.board.hear_learner(Place("learner", "10.0.0.1"), LearnerReport(300, 0, 1, 1.7e9))
    told.board.hear_table(told.table())
    told.board.hear_table(told.table("shop", sizes={10**9: 100}))
    told.served(told.end(), told.end("shop", 10**9))


async def test_every_replica_is_shown(told: Any) -> None:
    async with served(told) as url, watched(url) as page:
        await expect(page.locator("#engines li")).to_have_count(2)
        await expect(page.locator("#replicas-note")).to_contain_text("2 engines, 1 router")
        shown = page.locator("#parts li")
        await expect(shown).to_have_count(2)
        await expect(shown.first).to_contain_text("Generator")
        await expect(shown.first).to_contain_text("12 updates made, 10 at hand")
        await expect(shown.last).to_contain_text("300 prompts learned")
        await expect(shown.last.locator("em")).to_have_text("1 namespace cannot be published")


async def test_nothing_moves_where_the_reader_wants_no_motion(told: Any) -> None:
    async with served(told) as url, watched(url) as page:
        await expect(page.locator("#status")).to_have_text("Live")
        moving = """() => [...document.querySelectorAll("*")].filter((one) => {
          const { transitionDuration: spans, animationName } = getComputedStyle(one);
          return animationName !== "none" || spans.split(",").some((span) => parseFloat(span));
        }).length"""
        await page.emulate_media(reduced_motion="no-preference")
        assert await page.evaluate(moving) > 0
        await page.emulate_media(reduced_motion="reduce")
        assert await page.evaluate(moving) == 0


async def test_a_request_pulses_on_the_map_unless_motion_is_unwanted(told: Any) -> None:
    count_pulses = """() => {
      window.pulses = 0;
      new MutationObserver((changes) => {
        const added = changes.flatMap((one) => [...one.addedNodes]);
        window.pulses += added.filter((one) => one.classList?.contains("pulse")).length;
      }).observe(document.getElementById("map"), { childList: true, subtree: true });
    }"""
    async with served(told) as url, watched(url) as page:
        await expect(page.locator("#status")).to_have_text("Live")
        await page.evaluate(count_pulses)
        await page.emulate_media(reduced_motion="reduce")
        for number in range(5):  # the last two answers may still bring what was served before
            if number < 3:
                told.served(told.end())
            async with page.expect_response("**/console/state*"):
                pass
        assert await page.evaluate("window.pulses") == 0
        await page.emulate_media(reduced_motion="no-preference")
        told.served(told.end())
        for _ in range(3):
            async with page.expect_response("**/console/state*"):
                pass
        assert await page.evaluate("window.pulses") == 1


async def test_the_page_is_small_and_kept_by_the_browser(told: Any) -> None:
    async with served(told) as url, chromium(str(CHROMIUM)) as browser:
        page = await browser.new_page()
        first = await opened(page, url)
        second = await opened(page, url)
    assert first.files <= 10
    assert first.size < 80 * 1024
    # Unchanged files are asked for again, and not sent.
    assert second.transferred < 10 * 1024 < first.transferred


async def test_a_key_is_asked_for_kept_in_the_tab_and_forgotten(told: Any) -> None:
    keys = Access(lambda: KEYS)
    async with served(told, keys) as url, watched(url, expected="401") as page:
        door, note = page.locator("#door"), page.locator("#door-note")
        status = page.locator("#status")
        await expect(door).to_be_visible()
        await expect(status).to_have_text("No access")

        async def give(key: str) -> None:
            await page.get_by_label("API key", exact=True).fill(key)
            await page.get_by_role("button", name="Use key").click()

        await give("ck-wrong")
        await expect(note).to_contain_text("may have been removed")
        await expect(door).to_be_visible()
        await give("ck-open")
        await expect(status).to_have_text("Live")
        await expect(door).to_be_hidden()
        # Kept for this tab, and nowhere that outlives it or is shared with the address.
        kept = "() => [sessionStorage.getItem('key'), JSON.stringify(localStorage), location.href]"
        inside, outside, address = await page.evaluate(kept)
        assert inside == "ck-open"
        assert "ck-open" not in outside + address
        await page.reload()
        await expect(status).to_have_text("Live")
        await page.locator("#key").click()
        await page.get_by_role("button", name="Forget").click()
        await expect(status).to_have_text("No access")
        await expect(door).to_be_visible()
        assert (await page.evaluate(kept))[0] is None


async def asked(page: Page) -> list[tuple[str, Any]]:
    """Run the trial; the namespace and the adaptation of what the page asks for."""
    bodies: list[dict[str, Any]] = []

    async def answer(route: Route) -> None:
        bodies.append(route.request.post_data_json)
        await route.fulfill(body="data: [DONE]\n\n", content_type="text/event-stream")

    await page.route("**/v1/chat/completions", answer)
    await page.locator("#prompt").fill("SELECT name FROM")
    await page.locator("#run").click()
    await expect(page.locator("#run")).to_contain_text("Run")  # "Stop" until both have ended
    await page.unroute("**/v1/chat/completions")
    return [(body.get("namespace", ""), body["adaptation"]) for body in bodies]


async def test_the_trial_adapts_by_the_cluster_that_the_address_names(told: Any) -> None:
    async with served(told) as url, watched(f"{url}#namespace=shop&cluster={10**9}") as page:
        await expect(page.locator("#detail-title")).to_have_text(f"Cluster {10**9}")
        assert sorted(await asked(page), key=str) == [("shop", "off"), ("shop", 10**9)]
        await page.get_by_label("Back to all clusters").click()
        assert sorted(await asked(page), key=str) == [("shop", "auto"), ("shop", "off")]
        await page.go_back()
        await expect(page.locator("#detail-title")).to_have_text(f"Cluster {10**9}")
        assert sorted(await asked(page), key=str) == [("shop", "off"), ("shop", 10**9)]


async def test_going_back_from_a_cluster_takes_it_from_the_trial(told: Any) -> None:
    async with served(told) as url, watched(url) as page:
        await page.locator("#list button").first.click()
        await expect(page.locator("#adaptation option")).to_have_count(2)
        assert sorted(await asked(page), key=str) == [("", "off"), ("", 3)]
        await page.go_back()
        await expect(page.locator("#detail")).to_be_hidden()
        await expect(page.locator("#adaptation option")).to_have_count(1)
        assert sorted(await asked(page), key=str) == [("", "auto"), ("", "off")]


async def test_why_an_adapter_cannot_be_downloaded_stays_to_be_read(told: Any) -> None:
    async with served(told) as url, watched(f"{url}#cluster=3", expected="503") as page:
        error = {"error": {"message": "No generator is up."}}
        await page.route("**/adapter", lambda route: route.fulfill(status=503, json=error))
        await page.get_by_role("button", name="Download adapter").click()
        failed = page.locator("#detail .failed")
        await expect(failed).to_contain_text("could not be downloaded: No generator is up.")
        for _ in range(2):
            async with page.expect_response("**/console/state*"):
                pass
        await expect(failed).to_be_visible()
        await expect(page.locator("#status")).to_have_text("Live")


async def test_replicas_are_not_shown_to_a_tenant(told: Any) -> None:
    keys = Access(lambda: KEYS)
    async with served(told, keys) as url, watched(url, expected="401") as page:
        note = page.locator("#replicas-note")
        for key, shown, text in (
            ("ck-open", 2, "2 engines, 1 router"),
            ("ck-bound", 0, "not bound to a namespace"),
        ):
            await page.evaluate("(key) => sessionStorage.setItem('key', key)", key)
            await page.reload()
            await expect(page.locator("#status")).to_have_text("Live")
            await expect(page.locator("#engines li")).to_have_count(shown)
            await expect(note).to_contain_text(text)
