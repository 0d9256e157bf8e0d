"""The web page in a browser, with a real server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import access_tokens
import pytest
from axe_playwright_python.async_playwright import Axe
from conftest import demo_settings
from playwright.async_api import Browser, Page, async_playwright, expect

from mpt_grpc.server.server import RunningServer, running_server
from mpt_grpc.settings import HttpSettings
from mpt_grpc_client import AsyncClient, Message, Role

BIN = Path(sys.executable).parent
CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync".split()
)
LONG = "Once upon a time there was a fox who lived in a wood with a bear and a crow, and all three were hungry. " * 2

expect.set_options(timeout=30_000)  # browsers and servers start slowly on a busy machine

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="needs chromium: apt-get install chromium"
)


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        yield await playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)


@pytest.fixture(scope="module")
async def served() -> AsyncIterator[RunningServer]:
    async with running_server(replace(demo_settings(), http=HttpSettings(port=0))) as server:
        yield server


@pytest.fixture
async def page(browser: Browser, served: RunningServer) -> AsyncIterator[Page]:
    """A freshly loaded page. Fails the test if it loads anything external or if a script fails."""
    origin = f"http://localhost:{served.http_port}"
    external: list[str] = []
    script_errors: list[str] = []
    page = await browser.new_page()
    page.on("request", lambda request: None if request.url.startswith(origin) else external.append(request.url))
    page.on("pageerror", lambda error: script_errors.append(str(error)))
    page.on(
        "console", lambda message: script_errors.append(message.text) if "Content Security" in message.text else None
    )
    await page.goto(f"{origin}/")
    yield page
    await page.close()
    assert not external
    assert not script_errors


async def generate(page: Page, **settings: Any) -> None:
    for name, value in settings.items():
        field = page.locator(f"[name={name}]")
        if not await field.is_visible():
            await page.get_by_text("More settings").click()
        await (field.check() if value is True else field.fill(str(value)))
    await page.locator("[type=submit]").click()


async def wait_for_status(page: Page, status: str, count: int) -> None:
    await expect(page.locator(".output header").filter(has_text=status)).to_have_count(count)


async def test_each_stream_shows_the_text_that_the_server_generates(page: Page, served: RunningServer) -> None:
    await generate(page, prompt="The fox said:", streams=3, max_tokens=40, temperature=0, ignore_eos=True)
    await wait_for_status(page, "token limit · 40 tokens", 3)
    async with AsyncClient(served.target) as client:
        generation = await client.generate("The fox said:", max_new_tokens=40, temperature=0, ignore_eos=True)
    texts = [await text.text_content() for text in await page.locator(".output .text").all()]
    assert texts == [f"The fox said:{generation.text}"] * 3


async def test_an_ignored_end_of_sequence_token_is_shown(page: Page, served: RunningServer) -> None:
    seed = 223  # one of the few with which this model ends early
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True, "skip_special_tokens": False}
    async with AsyncClient(served.target) as client:
        text = (await client.generate("The end.", seed=seed, **options)).text
    assert "<|endoftext|>" in text[:-20]
    await generate(page, prompt="The end.", streams=1, max_tokens=30, temperature=1, seed=seed, ignore_eos=True)
    await wait_for_status(page, "token limit", 1)
    assert await page.locator(".output .text").text_content() == f"The end.{text}"


async def test_streams_beyond_the_browsers_connections_wait_and_can_be_stopped(page: Page) -> None:
    for _ in range(2):
        await generate(page, prompt=LONG, streams=5, max_tokens=1500, ignore_eos=True)
    await expect(page.locator("[data-of=running]")).to_have_text("5")
    await expect(page.locator(".output header").filter(has_text="waiting")).to_have_count(5)
    stops = page.get_by_role("button", name="Stop", exact=True)
    await stops.nth(0).click()
    await wait_for_status(page, "stopped", 1)
    await expect(page.locator(".output").last.locator(".token").first).to_be_visible()
    await stops.last.click()
    await wait_for_status(page, "stopped · ", 1)
    await expect(page.locator(".output header").filter(has_text="waiting")).to_have_count(3)
    await page.keyboard.press("Escape")
    await wait_for_status(page, "stopped", 10)


async def test_a_chat_message_is_formatted_with_the_chat_template(page: Page) -> None:
    await page.get_by_label("Chat", exact=True).check()
    await generate(page, message="Who are you?", max_tokens=12, temperature=0, ignore_eos=True, stop="\\nU")
    await wait_for_status(page, "token limit · 12 tokens", 1)
    assert await page.locator(".output .text").text_content()


async def test_the_stop_string_is_not_shown(page: Page) -> None:
    await generate(page, prompt="Once upon a time", streams=1, max_tokens=40, temperature=0, stop="ttle")
    await wait_for_status(page, "stop · ", 1)
    assert await page.locator(".output .text").text_content() == "Once upon a time, and a li"


async def test_the_mouse_and_the_arrow_keys_show_the_alternatives_of_a_token(page: Page) -> None:
    await generate(page, prompt="Once upon a time", streams=1, max_tokens=8, temperature=0, ignore_eos=True)
    await wait_for_status(page, "token limit", 1)
    tokens, tooltip = page.locator(".token"), page.locator("#token")
    await tokens.nth(0).hover()
    await expect(tooltip.locator("li")).to_have_count(6)
    first = await tooltip.locator("li.chosen").text_content()
    percentages = [
        float(percentage.removesuffix("%")) for percentage in await tooltip.locator(".number").all_text_contents()
    ]
    assert percentages == sorted(percentages, reverse=True)
    assert 0 < sum(percentages) <= 100.1
    await page.mouse.move(0, 0)
    await expect(tooltip).to_be_hidden()
    await page.locator(".output .text").focus()
    await page.keyboard.press("ArrowRight")
    await expect(tooltip.locator("li.chosen")).to_have_text(first or "")
    await page.keyboard.press("ArrowRight")
    await expect(tokens.nth(1)).to_have_class(re.compile("current"))


async def test_unlikely_tokens_are_coloured_and_likely_ones_are_not(page: Page) -> None:
    await generate(page, prompt="Once upon a time", streams=1, max_tokens=60, temperature=1.5, seed=3, ignore_eos=True)
    await wait_for_status(page, "token limit", 1)
    for token in (await page.locator(".token").all())[::6]:
        await token.hover()
        percentage = float((await page.locator("#token li.chosen .number").text_content() or "").removesuffix("%"))
        level = sum(percentage < limit for limit in (50, 20, 5, 1))
        assert (await token.get_attribute("class") or "").split()[1:2] == (
            [f"unlikely-{level}"] if level else ["current"]
        )


async def test_stopping_a_stream_cancels_it_on_the_server_and_leaves_others_running(
    page: Page, served: RunningServer
) -> None:
    await generate(page, prompt=LONG, streams=2, max_tokens=1500, ignore_eos=True)
    await expect(page.locator(".output").nth(0).locator(".token").nth(3)).to_be_visible()
    await page.locator(".output").nth(0).get_by_role("button", name="Stop").click()
    await wait_for_status(page, "stopped · ", 1)
    async with AsyncClient(served.target) as client:
        while len((await client.get_engine_state()).active_requests) != 1:
            pass
        await page.keyboard.press("Escape")
        while (await client.get_engine_state()).active_requests:
            pass
    await wait_for_status(page, "stopped · ", 2)
    await page.get_by_role("button", name="Clear").click()
    await expect(page.locator(".output")).to_have_count(0)


async def test_an_error_message_names_the_field(page: Page) -> None:
    await generate(page, streams=1, temperature=-1)
    await expect(page.get_by_role("alert")).to_have_text(re.compile("temperature: -1.0 is not in"))


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("temperature", "0.8 0.2", "Use numbers separated by commas"),
        ("temperature", "-", "Use numbers separated by commas"),
        ("seed", "7 8", "Use whole numbers"),
        ("seed", "9007199254740992", "Use whole numbers"),
        ("temperature", ",".join(["1"] * 51), "These are 51 streams; at most 50 can be compared."),
    ],
)
async def test_lists_of_numbers_are_checked_before_they_are_sent(
    page: Page, name: str, value: str, problem: str
) -> None:
    await generate(page, streams=1, **{name: value})
    field = page.locator(f"[name={name}]")
    assert (await field.evaluate("field => field.validationMessage")).startswith(problem)
    await expect(page.locator(".output")).to_have_count(0)
    await page.get_by_text("Request as code").click()
    await expect(page.locator("#code pre")).to_contain_text(problem)


async def test_the_engine_panel_shows_running_requests(page: Page) -> None:
    await generate(page, prompt=LONG, streams=1, max_tokens=1)
    await wait_for_status(page, "token limit", 1)
    await generate(page, prompt=LONG, streams=3, max_tokens=1500, ignore_eos=True)
    await expect(page.locator("[data-of=running]")).to_have_text("3")
    await expect(page.locator("#cache-text")).to_have_text(re.compile(r"^\d+ of [\d,]+ blocks used, [1-9]\d* shared, "))
    await expect(page.locator("[data-value-of=throughput]")).to_have_text(re.compile(r"^[1-9][\d,]*$"))
    await expect(page.locator("[data-value-of=ttft]")).to_have_text(re.compile(r"^\d+ ms$"))
    await expect(page.locator("#waterfall li .decode").nth(2)).to_be_visible()
    await page.keyboard.press("Escape")
    await expect(page.locator("[data-of=running]")).to_have_text("0")
    await expect(page.locator("#waterfall")).to_have_text(re.compile("cancelled"))


async def test_the_page_reports_a_server_that_is_not_reachable_and_recovers(page: Page) -> None:
    status = page.locator("#engine-status")
    await page.context.set_offline(True)
    await expect(status).to_have_text(re.compile("not reachable: "))
    await generate(page, streams=1)
    await expect(page.get_by_role("alert")).not_to_be_empty()
    await page.context.set_offline(False)
    await expect(status).to_be_empty()


async def test_the_api_documentation_loads_nothing_external(page: Page) -> None:
    await page.get_by_role("link", name="HTTP API").click()
    await expect(page.locator(".opblock-summary-path").filter(has_text="/v1/completions")).to_be_visible()
    await page.locator(".opblock-summary-path").filter(has_text="/v1/chat/completions").click()
    await expect(page.locator(".opblock-body").get_by_text("temperature").first).to_be_visible()


async def test_the_page_works_with_the_keyboard_alone(page: Page) -> None:
    await page.keyboard.press("Tab")
    while await page.evaluate("document.activeElement.id") != "prompt":
        await page.keyboard.press("Tab")
    await page.keyboard.press("Control+a")
    await page.keyboard.type("The bear")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator(".output .text").nth(2)).to_contain_text("The bear")
    await expect(page.locator(".output .token").nth(0)).to_be_visible()
    await page.keyboard.press("Escape")


async def test_a_chat_shows_the_prompt_that_the_template_makes(page: Page) -> None:
    await page.get_by_label("Chat", exact=True).check()
    await page.fill("[name=message]", "Are you sly?")
    await page.get_by_text("Prompt after the chat template").click()
    await expect(page.locator("#rendered")).to_contain_text("Are you sly?")
    await page.fill("[name=system]", "You are a fox.")
    await expect(page.locator("#rendered")).to_contain_text("You are a fox.")
    shown = page.locator("#rendered .token")
    await expect(page.get_by_text("Prompt after the chat template")).to_contain_text(f"({await shown.count()} tokens)")
    await page.locator("#rendered .text").focus()
    await page.keyboard.press("ArrowRight")
    await expect(page.locator("#token li")).to_have_text([re.compile("first$")])
    await page.keyboard.press("ArrowRight")
    await expect(page.locator("#token li.chosen")).to_contain_text("%")
    await page.get_by_label("Continue a text").check()
    await expect(page.locator("#rendered")).to_be_hidden()


async def chat(page: Page, message: str) -> str:
    """Sends a message with the keyboard, and returns the chosen reply once all replies to it have ended."""
    await page.locator("[name=message]").focus()
    await page.keyboard.type(message)
    await page.keyboard.press("Enter")
    turn = page.locator("#turns > li").last
    await expect(turn.locator(".message")).to_have_text(message)
    await expect(page.locator("#stop-all")).to_be_disabled()
    return (await turn.locator(".output:has(:checked) .text, .output:only-child .text").text_content() or "").strip()


async def test_a_conversation_goes_on_from_the_chosen_replies(page: Page, served: RunningServer) -> None:
    options: Any = {"max_tokens": 6, "temperature": "0, 1.5", "seed": 3}
    await page.get_by_label("Chat", exact=True).check()
    for name, value in options.items():
        await page.fill(f"[name={name}]", str(value))
    await page.fill("[name=system]", "You are a fox.")
    first = await chat(page, "Who are you?")
    await page.locator("#turns > li").last.get_by_label("Continue with this reply").nth(1).check()
    chosen = (await page.locator("#turns .output").nth(1).locator(".text").text_content() or "").strip()
    assert chosen != first
    reply = await chat(page, "Are you sly?")
    await expect(page.get_by_label("Continue with this reply").nth(1)).to_be_disabled()
    messages: list[Any] = [
        Message(Role.SYSTEM, "You are a fox."),
        Message(Role.USER, "Who are you?"),
        Message(Role.ASSISTANT, chosen),
        Message(Role.USER, "Are you sly?"),
    ]
    async with AsyncClient(served.target) as client:
        result = await client.generate(messages, max_new_tokens=6, temperature=0, seed=3)
    assert reply == result.text.strip()


async def test_the_last_turn_of_a_conversation_is_retried_or_edited(page: Page) -> None:
    await page.get_by_label("Chat", exact=True).check()
    await page.fill("[name=max_tokens]", "6")
    await page.fill("[name=temperature]", "0")
    first = await chat(page, "Who are you?")
    reply = await chat(page, "Are you sly?")
    await page.fill("[name=message]", "a draft")
    await page.fill("[name=max_tokens]", "9")
    await page.get_by_role("button", name="Retry").last.press("Enter")
    await wait_for_status(page, "token limit · 9 tokens", 1)
    await expect(page.locator("#turns .text").last).to_have_text(re.compile(rf"\s*{re.escape(reply)}"))
    assert await page.locator("[name=message]").input_value() == "a draft"
    await page.get_by_role("button", name="Edit").last.press("Enter")
    await expect(page.locator("#turns > li")).to_have_count(1)
    await expect(page.locator("[name=message]")).to_be_focused()
    assert await page.locator("[name=message]").input_value() == "Are you sly?"
    await page.get_by_role("button", name="Clear").click()
    await expect(page.locator("#turns > li")).to_have_count(0)
    await page.fill("[name=message]", "")
    await page.fill("[name=max_tokens]", "6")
    assert await chat(page, "Who are you?") == first


async def test_a_retry_with_a_setting_that_is_not_valid_keeps_the_message(page: Page) -> None:
    await page.get_by_label("Chat", exact=True).check()
    await page.fill("[name=max_tokens]", "6")
    await chat(page, "Who are you?")
    await page.fill("[name=temperature]", "warm")
    await page.get_by_role("button", name="Retry").click()
    await expect(page.locator("#turns > li")).to_have_count(0)
    assert await page.locator("[name=message]").input_value() == "Who are you?"
    await page.fill("[name=temperature]", "0")
    await page.locator("[type=submit]").click()
    await expect(page.locator("#turns .message")).to_have_text("Who are you?")


async def test_a_stopped_reply_is_continued_and_a_failed_one_is_left_out(page: Page) -> None:
    await page.get_by_label("Chat", exact=True).check()
    await page.get_by_text("Request as code").click()
    await generate(page, message=LONG, max_tokens=1500, ignore_eos=True)
    await expect(page.locator("#turns .token").nth(3)).to_be_visible()
    await expect(page.locator("[type=submit]")).to_be_disabled()
    await page.keyboard.press("Escape")
    await wait_for_status(page, "stopped", 1)
    await page.fill("[name=message]", "Go on.")
    await expect(page.locator("#code pre")).to_contain_text('"role":"assistant"')
    await page.get_by_role("button", name="Edit").click()
    await generate(page, message="Who are you?", temperature=-1)
    await expect(page.get_by_role("alert")).to_have_text(re.compile("temperature"))
    await page.fill("[name=message]", "Go on.")
    await expect(page.locator("#code pre")).not_to_contain_text("Who are you?")


async def test_temperatures_and_seeds_are_compared_side_by_side(page: Page, served: RunningServer) -> None:
    await generate(
        page, prompt="The fox", streams=1, max_tokens=8, temperature="0.5, 1.5", seed="7, 8", ignore_eos=True
    )
    await wait_for_status(page, "token limit · 8 tokens", 4)
    labels = [(0.5, 7), (0.5, 8), (1.5, 7), (1.5, 8)]
    shown = await page.locator(".output").all()
    async with AsyncClient(served.target) as client:
        for output, (temperature, seed) in zip(shown, labels, strict=True):
            await expect(output.locator("header")).to_contain_text(f"temperature {temperature}, seed {seed} · ")
            options: Any = {"temperature": temperature, "seed": seed, "max_new_tokens": 8, "ignore_eos": True}
            text = (await client.generate("The fox", **options, skip_special_tokens=False)).text
            assert await output.locator(".text").text_content() == f"The fox{text}"


@pytest.mark.parametrize("kind", ["Continue a text", "Chat"])
@pytest.mark.parametrize("language", ["curl", "grpcurl", "Python"])
async def test_a_request_as_code_generates_the_same(
    page: Page, served: RunningServer, language: str, kind: str
) -> None:
    await page.get_by_label(kind, exact=True).check()
    written: dict[str, Any]
    written = {"message": "It's a fox"} if kind == "Chat" else {"prompt": "It's a fox\n", "streams": 1}
    await generate(page, **written, max_tokens=8, temperature="0.5", seed="7", stop="zzz")
    await wait_for_status(page, "· 8 tokens", 1)
    shown = (await page.locator(".output .text").text_content() or "").removeprefix("It's a fox\n")
    if kind == "Chat":
        await page.get_by_role("button", name="Edit").click()
    await page.get_by_text("Request as code").click()
    await page.locator("#code select").select_option(language)
    code = (await page.locator("#code pre").text_content() or "").replace("localhost:50051", served.target)
    printed = await run_code(language, code)
    assert shown.strip() in (printed if language == "Python" else json.loads('"' + _text(printed) + '"'))


@pytest.fixture
async def protected(browser: Browser, tmp_path: Path) -> AsyncIterator[tuple[Page, RunningServer]]:
    """The page of a server that requires access tokens, opened with alice's, and the server."""
    settings = demo_settings()
    listening = replace(settings.server, tokens_file=access_tokens.write(tmp_path / "tokens.toml"))
    async with running_server(replace(settings, server=listening, http=HttpSettings(port=0))) as server:
        credentials: Any = {"username": "alice", "password": access_tokens.SECRETS["alice"]}
        page = await browser.new_page(http_credentials=credentials)
        await page.clock.install()
        await page.goto(f"http://localhost:{server.http_port}/")
        yield page, server
        await page.close()


@pytest.mark.parametrize("language", ["curl", "grpcurl", "Python"])
async def test_a_request_as_code_reads_the_access_token_from_the_environment(
    protected: tuple[Page, RunningServer], language: str
) -> None:
    page, server = protected
    await page.get_by_text("Request as code").click()
    await page.locator("#code select").select_option(language)
    await expect(page.locator("#code pre")).to_contain_text("MPT_GRPC_TOKEN")
    code = (await page.locator("#code pre").text_content() or "").replace("localhost:50051", server.target)
    assert access_tokens.SECRETS["alice"] not in code
    printed = await run_code(language, code, MPT_GRPC_TOKEN=access_tokens.SECRETS["alice"])
    assert printed.strip()
    assert '"error"' not in printed


async def test_the_state_of_the_engine_is_not_fetched_again_by_a_caller_who_may_not_see_it(
    protected: tuple[Page, RunningServer],
) -> None:
    page, _ = protected
    await expect(page.locator("#engine-status")).to_have_text(re.compile("role"))
    fetched: list[str] = []
    page.on("request", lambda request: fetched.append(request.url))
    await page.clock.run_for(5_000)
    assert await page.evaluate("fetch('version').then((response) => response.status)") == 200
    assert [url for url in fetched if url.endswith("/debug/engine")] == []


async def run_code(language: str, code: str, **variables: str) -> str:
    """Returns what a request as code prints."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    if shutil.which(language.lower(), path=path) is None:
        pytest.skip(f"{language} is not in this environment")
    command = ["python", "-c", code] if language == "Python" else ["sh", "-c", code]
    environment = {**os.environ, "PATH": path, **variables}
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment)
    return (await process.communicate())[0].decode()


def _text(response: str) -> str:
    """Returns the text in the JSON of a response, as written there."""
    (text,) = re.findall(r'"(?:text|content)": ?"((?:[^"\\]|\\.)*)"', response)
    return str(text)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_is_accessible_and_fits_with_everything_open(page: Page, scheme: Any, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 844})
    await page.emulate_media(color_scheme=scheme)
    await page.get_by_label("Chat", exact=True).check()
    for summary in await page.locator("summary").all():
        await summary.click()
    await expect(page.locator("#rendered")).not_to_be_empty()
    await generate(page, message="Who are you?", max_tokens=12, temperature="0, 2", ignore_eos=True)
    await wait_for_status(page, "· 12 tokens", 2)
    found = await Axe().run(page)
    assert [violation["id"] for violation in found.response["violations"]] == []
    assert await page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_fits_a_phone_and_has_enough_contrast(page: Page, scheme: Any) -> None:
    await page.set_viewport_size({"width": 360, "height": 740})
    await page.emulate_media(color_scheme=scheme)
    await generate(page, prompt="Once upon a time", streams=4, max_tokens=12, temperature=0)
    await wait_for_status(page, "· 12 tokens", 4)
    assert await page.evaluate("document.documentElement.scrollWidth") == 360
    assert await page.evaluate(CONTRAST) >= 4.5
    screenshot = await page.screenshot(full_page=True)
    assert screenshot.startswith(b"\x89PNG")


# Returns the lowest contrast of any text with its background, by WCAG's formula.
CONTRAST = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const colour = channels(getComputedStyle(element).backgroundColor);
      if (colour.length === 3) return colour;
    }
    return [255, 255, 255];
  };
  const texts = [...document.body.querySelectorAll("*")].filter(
    (element) => !element.disabled && element.checkVisibility()
      && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return Math.min(...texts.map((element) => {
    const style = getComputedStyle(element);
    const lights = [light(channels(element.closest("svg") ? style.fill : style.color)), light(background(element))];
    return (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
  }));
}"""
