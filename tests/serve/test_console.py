"""The console in a real browser, over the running service."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Page, async_playwright, expect

pytestmark = pytest.mark.serve

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 120_000


@pytest.fixture
async def page(service: Any) -> AsyncIterator[Page]:
    """The console, opened. Ends with an assertion that the page had no error and called nobody."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (`apt install chromium`, or CHROMIUM=/path/to/it)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        errors: list[str] = []
        hosts: set[str] = set()
        page.on("console", lambda one: errors.append(one.text) if one.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        await page.goto(service.url)
        yield page
        await browser.close()
    assert errors == []
    assert hosts - {""} == {urlsplit(service.url).netloc}


async def test_clusters_and_replicas_are_shown(page: Page, service: Any) -> None:
    expect.set_options(timeout=PATIENCE_MS)
    await expect(page.locator("#status")).to_have_text("Live")
    known = len((await service.async_openai().get("/clusters", cast_to=object))["data"])
    assert known > 1
    await expect(page.locator("#list li")).to_have_count(known)
    await expect(page.locator("#map .node")).to_have_count(known)
    await expect(page.locator("#engines li")).to_have_count(1)


async def test_one_prompt_is_answered_adapted_and_unadapted(page: Page) -> None:
    expect.set_options(timeout=PATIENCE_MS)
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
    expect.set_options(timeout=PATIENCE_MS)
    await expect(page.locator("#status")).to_have_text("Live")
    seen = "getComputedStyle(document.documentElement).backgroundColor"
    await page.emulate_media(color_scheme="light")
    light = await page.evaluate(seen)
    await page.emulate_media(color_scheme="dark")
    assert await page.evaluate(seen) != light
    await page.set_viewport_size({"width": 390, "height": 844})
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
