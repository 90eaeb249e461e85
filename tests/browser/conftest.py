"""A real page in a real browser: the server runs in this process, Chromium beside it.

Every page must come without errors on its console and without one request to another machine.
"""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from pitome_mllm import load
from pitome_mllm_demo.app import CACHE, serve
from pitome_mllm_demo.engine import Engine

WIDE, NARROW = (1280, 720), (390, 844)
FLAGS = [
    "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip


OUTSIDE = []  # other machines that this process, and so the server, looked up or asked


def _note_outside(event, given):
    if event in ("socket.getaddrinfo", "socket.connect"):
        address = given[0] if event == "socket.getaddrinfo" else given[1]
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "localhost", "::1", None) and not str(host).startswith("/"):
            OUTSIDE.append((event, host))


sys.addaudithook(_note_outside)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The page of the embedded model: its parts, its address as ``served.url``, Gradio's folder as ``served.cache``."""
    folder = tmp_path_factory.mktemp("demo")
    page = serve(Engine("tiny", *load("tiny")), folder, "127.0.0.1", None, False, prevent_thread_lock=True, quiet=True)
    page.url, page.cache = page.blocks.local_url, folder / CACHE
    yield page
    page.blocks.close()


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """One person with a browser context of their own; ``page`` is Playwright's."""

    def __init__(self, browser, url, size=WIDE, scheme="light"):
        view = {"width": size[0], "height": size[1]}
        self.context = browser.new_context(viewport=view, permissions=["camera"], color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", lambda request: self._request(request.url, url))
        self.page.goto(url)
        self.page.wait_for_selector("#pm-box textarea", timeout=60_000)
        self.page.wait_for_selector("#pm-plan .pm-plan", timeout=60_000)
        self.page.wait_for_selector("#pm-groups img", timeout=60_000)  # the picture that it opens with

    def _console(self, message):
        if message.type == "error":
            self.complaints.append(f"console: {message.text} {message.location}")

    def _request(self, address, url):
        if not address.startswith((url, "data:", "blob:")):
            self.complaints.append(f"request: {address}")

    def add(self, path):
        before = self.page.locator("#pm-box .thumbnail-item").count()
        self.page.locator("#pm-box input[type=file]").set_input_files(str(path))
        self.until(lambda: self.page.locator("#pm-box .thumbnail-item").count() > before)

    def send(self, question, path=None):
        if path is not None:
            self.add(path)
        box = self.page.locator("#pm-box textarea")
        box.fill(question)
        box.press("Enter")

    def ask(self, question, path=None):
        """Ask and wait for all figures; returns the text of the merged reply."""
        before = self.page.locator(".pm-merged.pm-done").count()
        self.send(question, path)
        self.until(lambda: self.page.locator(".pm-merged.pm-done").count() > before)
        return self.last(".pm-merged .pm-text")

    def last(self, selector):
        return self.page.locator(f"#pm-chat {selector}").last.inner_text()

    def keep(self, count):
        number = self.page.locator("#pm-keep input[type=number]")
        number.fill(str(count))
        number.press("Tab")
        self.until(lambda: f"{count} of 576" in self.page.locator("#pm-plan").inner_text())

    def choose(self, part, text):
        """From a menu; a method by its name alone."""
        if not self.page.locator(part).is_visible():
            self.page.get_by_role("button", name="More settings").click()
        self.page.locator(f"{part} input").first.click()
        self.page.get_by_role("option", name=re.compile(rf"^{re.escape(text)}( \(.*|)$")).click()

    def tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def until(self, true, seconds=90):
        """Wait for something to become true, letting the browser's events in."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                notice, chat = (self.page.locator(part).all_inner_texts() for part in ("#pm-notice", "#pm-chat"))
                raise AssertionError(f"not within {seconds} s; {self.complaints}, notice {notice}, chat {chat}")
            self.page.wait_for_timeout(50)

    def in_view(self, selector):
        """Whether all of the first such part lies in the window."""
        return self.page.locator(selector).first.evaluate(
            "e => { const b = e.getBoundingClientRect(); return b.top >= -1 && b.bottom <= innerHeight + 1 }"
        )

    def shot(self, name, whole=True):
        """A screenshot of the whole page, kept where PITOME_SHOTS says."""
        if os.environ.get("PITOME_SHOTS"):
            folder = Path(os.environ["PITOME_SHOTS"])
            folder.mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=folder / f"{name}.png", full_page=whole)


@pytest.fixture
def visit(chromium, served):
    """Visitors by calling it; when the test ends, none of them may have anything to complain about."""
    visitors = []

    def come(size=WIDE, url=served.url, scheme="light"):
        visitors.append(Visitor(chromium, url, size, scheme))
        return visitors[-1]

    yield come
    for visitor in visitors:
        visitor.context.close()
    assert [visitor.complaints for visitor in visitors] == [[] for _ in visitors]
    assert OUTSIDE == []


@pytest.fixture
def visitor(visit):
    return visit()
