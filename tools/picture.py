"""Takes the screenshot docs/page.png: the web page in use with the built-in model, in Debian's chromium."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from playwright.async_api import async_playwright

from mpt_grpc.server.server import running_server
from mpt_grpc.settings import CacheSettings, HttpSettings, ServerSettings, Settings

PICTURE = Path(__file__).parents[1] / "docs/page.png"
PROMPT = (
    "Once upon a time there was a fox who lived in a wood with a bear and a crow, and all three were hungry. “Let us go"
    " to the mill together,” said the fox, “for the miller is asleep, and his door is open.” But the crow, who was old"
    " and had seen many mills, shook her head and said:"
)


async def main() -> None:
    settings = Settings(
        cache=CacheSettings(kv_cache_bytes=128 << 20), server=ServerSettings(grpc_port=0), http=HttpSettings(port=0)
    )
    async with running_server(settings) as server, async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = await browser.new_page(viewport={"width": 1500, "height": 900})
        await page.goto(f"http://localhost:{server.http_port}/")
        await page.fill("[name=prompt]", PROMPT)
        await page.fill("[name=seed]", "7")
        for number, max_tokens in enumerate(("60", "90", "600")):
            await page.fill("[name=max_tokens]", max_tokens)
            await page.get_by_role("button", name="Generate").click()
            if number < 2:
                await page.locator("#stop-all:disabled").wait_for()
                await page.get_by_role("button", name="Clear").click()
        await page.locator(".output:last-child .token").nth(120).wait_for()
        await page.locator(".output:nth-child(2) .unlikely-2:nth-child(n+60)").first.hover()
        await page.screenshot(path=PICTURE)
        await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
