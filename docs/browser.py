"""Chromium as the console's pictures, tests and load times use it."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from playwright.async_api import Browser, Page, async_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
"""Path of the browser; None where there is none."""

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@asynccontextmanager
async def chromium(executable: str) -> AsyncIterator[Browser]:
    """A headless browser that calls nobody of its own accord."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=list(_FLAGS))
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def watched(url: str, expected: str = "", patience_ms: int = 120_000) -> AsyncIterator[Page]:
    """A page, opened at `url`, that is looked after to its end.

    Args:
        url: where.
        expected: errors in the browser's console that hold this are none.
        patience_ms: for every step of the page.

    Raises:
        AssertionError: at the end; the page had an error, or called somebody else.
    """
    async with chromium(str(CHROMIUM)) as browser:
        page = await browser.new_page()
        page.set_default_timeout(patience_ms)
        errors: list[str] = []
        hosts: set[str] = set()
        page.on("console", lambda one: errors.append(one.text) if one.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        await page.goto(url)
        yield page
    assert [one for one in errors if not expected or expected not in one] == []
    assert hosts - {""} == {urlsplit(url).netloc}
