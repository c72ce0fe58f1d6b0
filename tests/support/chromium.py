"""A page in the Chromium that is installed, driven by playwright. Without either the test is skipped, but not in CI."""

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Opened:
    """A page, and what it did that a page of ours must not do.

    Attributes:
        page: playwright's.
        problems: errors of its scripts, of its console, and requests that left the file.
    """

    page: Any
    problems: list = field(default_factory=list)


def chromium_path():
    """Where Chromium is; skips the test where it, or playwright, is not installed, and fails it there if CI is set."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        found, missing = None, "playwright is not installed"
    else:
        missing = "no Chromium is installed (" + ", ".join(NAMES) + ")"
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    return found


@contextlib.contextmanager
def page_of(path, *, width=1200, height=900, address="", **context):
    """The file opened from file:// at this size, with ``address`` behind its name (#...): an :class:`Opened`. ``context``:
    of playwright's new_context."""
    from playwright.sync_api import sync_playwright

    executable = chromium_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            page = browser.new_context(viewport={"width": width, "height": height}, **context).new_page()
            opened, whole = Opened(page), path.resolve().as_uri() + address
            page.on("pageerror", lambda error: opened.problems.append(f"script: {error}"))
            page.on("console", lambda said: said.type == "error" and opened.problems.append(f"console: {said.text}"))
            page.on(
                "request",
                lambda asked: (
                    asked.url == whole.partition("#")[0]
                    or asked.url == whole
                    or asked.url.startswith("data:")
                    or opened.problems.append(f"asks {asked.url}")
                ),
            )
            page.goto(whole)
            yield opened
        finally:
            browser.close()
