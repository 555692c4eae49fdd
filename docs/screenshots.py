"""Pictures of the console for the guide, from a running service under traffic of several domains.

    serve run deploy/config.yaml
    python docs/screenshots.py --url http://127.0.0.1:8000

Sends the traffic itself, for two namespaces, then drives Chromium (`--chromium`, else the one on
the path) and writes WebP files to docs/images.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import random
from pathlib import Path

from browser import CHROMIUM, chromium
from openai import AsyncOpenAI, OpenAIError
from PIL import Image
from playwright.async_api import Page

IMAGES = Path(__file__).parent / "images"

_TOPICS = {
    "refund": (
        "I was charged twice for order {n} and the second payment of {n} euros is still missing. "
        "How do I get my money back?",
        "My card was declined at the {w} shop although there is enough money on the account. Why?",
    ),
    "sql": (
        "Write an SQL query that joins {w} and orders and counts the rows by country.",
        "SELECT {w}, count(*) FROM orders WHERE total > {n} GROUP BY {w} ORDER BY 2 DESC; Explain.",
    ),
    "recipe": (
        "How do I bake {w} bread with {n} grams of rye flour, water, salt and yeast?",
        "Give me a recipe for {w} soup with onions, butter and fresh parsley.",
    ),
    "python": (
        "def parse_{w}(text: str) -> int: write the body of this Python function, with tests.",
        "import numpy as np\nfor i in range({n}): print({w}[i])\nWhy is this an IndexError?",
    ),
    "medicine": (
        "A patient of {n} years has had {w} pain and fever for three days. Which examinations and "
        "which treatment does the study suggest?",
    ),
    "scripture": (
        "And it came to pass in the {n}th year that the king of {w} spake unto his servants.",
    ),
}
_WORDS = (
    "green",
    "river",
    "winter",
    "garden",
    "stone",
    "silver",
    "market",
    "north",
    "apple",
    "old",
)


def prompts(seed: int) -> list[str]:
    """One prompt of every topic and form, in random order."""
    rng = random.Random(seed)
    forms = [form for forms in _TOPICS.values() for form in forms]
    rng.shuffle(forms)
    return [form.format(n=rng.randint(2, 999), w=rng.choice(_WORDS)) for form in forms]


async def traffic(url: str, namespace: str, seed: int) -> None:
    """Send one request after the other until cancelled."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    model = (await client.models.list()).data[0].id
    rng = random.Random(seed)
    for round_ in itertools.count(seed * 10_000):
        for prompt in prompts(round_):
            try:
                await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=rng.choice((8, 16, 48)),
                    extra_body={"namespace": namespace} if namespace else {},
                )
            except OpenAIError as error:
                print(f"traffic: {error}")
                await asyncio.sleep(1)


async def save(page: Page, name: str) -> None:
    """Write what the page shows to docs/images."""
    image = Image.open(io.BytesIO(await page.screenshot())).convert("RGB")
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{name}.webp"
    image.save(path, quality=82, method=6)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


async def compare(page: Page, prompt: str) -> None:
    """Run the try-it box to its end."""
    await page.get_by_label("Prompt", exact=True).fill(prompt)
    await page.locator("#tokens").fill("72")
    await page.locator("#run").click()
    await page.locator("#verdict:not(:empty)").wait_for(timeout=180_000)


async def shoot(url: str, executable: str, warm_s: float) -> None:
    """Warm up, and take every picture."""
    sending = [asyncio.create_task(traffic(url, *one)) for one in (("", 1), ("", 2), ("shop", 3))]
    done, _ = await asyncio.wait(sending, timeout=warm_s)
    for failed in done:  # it ends only if something is wrong: no pictures of an idle service
        failed.result()
    async with chromium(executable) as browser:
        page = await browser.new_page(viewport={"width": 1440, "height": 900})
        await page.goto(url)
        await page.locator(".node").first.wait_for()
        await page.wait_for_timeout(3000)
        await save(page, "console-light")
        busiest = page.locator("#list button").first
        await busiest.click()
        await page.locator("#detail .facts").wait_for()
        await page.wait_for_timeout(1500)
        await save(page, "console-cluster")
        await page.emulate_media(color_scheme="dark")
        await page.keyboard.press("Escape")
        await page.wait_for_timeout(1500)
        await compare(page, "Write an SQL query that counts orders by country for the last year.")
        await page.locator("#try").scroll_into_view_if_needed()
        await page.evaluate("document.querySelector('#try').scrollIntoView({block: 'center'})")
        await save(page, "console-try")
    for task in sending:
        task.cancel()
    await asyncio.gather(*sending, return_exceptions=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--chromium", default=CHROMIUM)
    parser.add_argument("--warm-s", type=float, default=90)
    args = parser.parse_args()
    if args.chromium is None:
        parser.error("needs Chromium: `apt install chromium`, or --chromium /path/to/it")
    asyncio.run(shoot(args.url, args.chromium, args.warm_s))


if __name__ == "__main__":
    main()
