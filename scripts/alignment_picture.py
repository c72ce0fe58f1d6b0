"""Take the picture of docs/alignment.md: what seecal report --alignment shows of the demo, in the Chromium that is there.

    python -m scripts.alignment_picture SEECAL-DEMO [OUT.png]

SEECAL-DEMO is the folder that `seecal demo` leaves. Needs playwright.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import seecal

RECORD = "held_image/name/1F641"
MARGIN = 16
PATCH = 4  # the one in the middle, which is pointed at


def page(demo: Path, out: Path) -> None:
    """The page of the model beside the one before stage 2, with names below the demo's folder."""
    os.chdir(demo)
    seecal.alignment("run/final", "eval.json", RECORD, other="run/stage-1/model", out=out)


def picture(html: Path, out: Path) -> None:
    """The record with its words, as the browser shows it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 1000, "height": 1100}, device_scale_factor=1.5)
        shown.goto(html.resolve().as_uri())
        shown.keyboard.press("w")
        shown.locator(".patch").nth(PATCH).hover()
        box = shown.locator(".record").first.bounding_box()
        assert box is not None
        edge = {"x": -MARGIN, "y": -MARGIN, "width": 2 * MARGIN, "height": 2 * MARGIN}
        shown.screenshot(path=out, clip={name: box[name] + more for name, more in edge.items()}, full_page=True)
        browser.close()


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    target = Path(sys.argv[2] if len(sys.argv) > 2 else root / "docs" / "alignment.png").resolve()
    with tempfile.TemporaryDirectory() as folder:
        page(Path(sys.argv[1]), Path(folder) / "page.html")
        picture(Path(folder) / "page.html", target)
