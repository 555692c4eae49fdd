"""The console in a real browser, over the running service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from browser import CHROMIUM, watched
from playwright.async_api import Page, expect

PATIENCE_MS = 120_000
pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="needs Chromium (`apt install chromium`, or CHROMIUM=/path/to/it)",
    ),
]


@pytest.fixture
async def page(service: Any) -> AsyncIterator[Page]:
    """The console, opened."""
    expect.set_options(timeout=PATIENCE_MS)
    async with watched(service.url, patience_ms=PATIENCE_MS) as one:
        yield one


async def test_clusters_and_replicas_are_shown(page: Page, service: Any) -> None:
    await expect(page.locator("#status")).to_have_text("Live")
    known = len((await service.async_openai().get("/clusters", cast_to=object))["data"])
    assert known > 1
    await expect(page.locator("#list li")).to_have_count(known)
    await expect(page.locator("#map .node")).to_have_count(known)
    await expect(page.locator("#engines li")).to_have_count(1)
    await expect(page.locator("#parts li")).to_have_count(1)
    await expect(page.locator("#parts")).to_contain_text("Generator")


async def test_one_prompt_is_answered_adapted_and_unadapted(page: Page) -> None:
    await page.locator("#list button").first.focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#detail-title")).to_be_focused()
    chosen = (await page.locator("#detail-title").inner_text()).lower()
    await page.locator("#tokens").fill("6")
    await page.locator("#prompt").fill("SELECT name FROM")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#verdict")).not_to_be_empty()
    for side in ("adapted", "off"):
        place = page.locator(f'[data-side="{side}"]')
        await expect(place.locator(".answer")).not_to_be_empty()
        await expect(place.locator("footer")).to_contain_text("tokens")
    await expect(page.locator('[data-side="adapted"] .chip')).to_contain_text(chosen)
    await expect(page.locator('[data-side="off"] .chip')).to_contain_text("no update")
    await page.keyboard.press("Escape")
    await expect(page.locator("#clusters")).to_be_visible()
    await expect(page.locator("#detail")).to_be_hidden()


async def test_dark_and_narrow(page: Page) -> None:
    await expect(page.locator("#status")).to_have_text("Live")
    seen = "getComputedStyle(document.documentElement).backgroundColor"
    await page.emulate_media(color_scheme="light")
    light = await page.evaluate(seen)
    await page.emulate_media(color_scheme="dark")
    assert await page.evaluate(seen) != light
    await page.set_viewport_size({"width": 390, "height": 844})
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
