"""How long the console takes from its address to the drawn map, and how much it loads.

    serve run deploy/config.yaml
    python tests/bench/console_load.py --url http://127.0.0.1:8000

Each repeat opens the page twice in a fresh profile: with nothing kept, and again with what the
browser then has. Bytes are as transferred, headers included.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from playwright.async_api import Page

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from browser import CHROMIUM, chromium

_FILES = """
() => performance.getEntriesByType('navigation').concat(performance.getEntriesByType('resource'))
  .filter((one) => !one.name.includes('/console/state'))
  .map((one) => [one.transferSize, one.decodedBodySize])
"""
"""Of every file of the page, the figures it polls left out: bytes transferred, and its size."""


@dataclass(frozen=True)
class Load:
    """One opening of the page.

    Attributes:
        seconds: from the navigation's start to the first cluster on the map.
        files: of the page.
        transferred: their bytes on the wire, compressed and with headers.
        size: their bytes once unpacked.
    """

    seconds: float
    files: int
    transferred: int
    size: int


async def opened(page: Page, url: str) -> Load:
    """Open the page in `page` and wait for its map."""
    await page.goto(url)
    await page.locator("#map .node").first.wait_for()
    seconds = await page.evaluate("performance.now() / 1000")
    files = await page.evaluate(_FILES)
    return Load(seconds, len(files), sum(one[0] for one in files), sum(one[1] for one in files))


async def measure(url: str, executable: str, repeats: int) -> tuple[list[Load], list[Load]]:
    """Openings with nothing kept, and with what the browser has from before."""
    cold, warm = [], []
    async with chromium(executable) as browser:
        for _ in range(repeats):
            context = await browser.new_context()
            page = await context.new_page()
            cold.append(await opened(page, url))
            warm.append(await opened(page, url))
            await context.close()
    return cold, warm


def summary(loads: list[Load]) -> str:
    """Median and range of the times, and what was loaded."""
    times = [one.seconds for one in loads]
    one = loads[-1]
    return (
        f"{statistics.median(times):.2f} s ({min(times):.2f}-{max(times):.2f}), {one.files} files, "
        f"{one.transferred / 1024:.1f} KiB transferred ({one.size / 1024:.1f} KiB unpacked)"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--chromium", default=CHROMIUM)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if args.chromium is None:
        parser.error("needs Chromium: `apt install chromium`, or --chromium /path/to/it")
    cold, warm = asyncio.run(measure(args.url, args.chromium, args.repeats))
    print(f"nothing kept: {summary(cold)}\nopened again: {summary(warm)}")


if __name__ == "__main__":
    main()
