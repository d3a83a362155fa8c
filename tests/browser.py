"""A real browser for tests of pages: this machine's Chromium, driven by playwright. Skips where either is absent."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class Seen:
    """A page, and what it said and asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))


@contextmanager
def open_browser(**options: Any) -> Iterator[Any]:
    """A context of a fresh profile. options: of playwright's `new_context`, such as color_scheme."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as tools:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses to run as root otherwise
        browser = tools.chromium.launch(executable_path=path, args=arguments)
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(20_000)
        yield context
        browser.close()


def background_of(page: Any) -> int:
    """How light the page's ground is, 0 to 255."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return int(colour.split("(")[1].split(",")[0])


def until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait; playwright's own wait_for_function evaluates strings, which our pages forbid."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.02)
