"""Take the pictures of docs/report.md and of the README: what seecal report shows of the demo, in Chromium.

    python -m scripts.screenshots SEECAL-DEMO [FOLDER]

SEECAL-DEMO is the folder that `seecal demo` leaves; FOLDER is docs. Needs playwright.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

import seecal

RECORDS = 4


def shot(
    browser: Any, page: Path, out: Path, *, dark: bool = False, width: int = 1080, height: int = 820, do: str = ""
) -> None:
    """What stands in the window after the script ``do``, in 256 colours: a fifth of the bytes."""
    shown = browser.new_page(
        viewport={"width": width, "height": height}, device_scale_factor=1.5, color_scheme="dark" if dark else "light"
    )
    shown.goto(page.resolve().as_uri())
    if do:
        shown.evaluate(do)
    shown.wait_for_timeout(200)
    shown.screenshot(path=out)
    shown.close()
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)


def records_sorted(by: str) -> str:
    """Scrolls to the first record, sorted."""
    return f"at('sort').value = '{by}'; update(); window.scrollTo(0, at('list').offsetTop - 8)"


def main(demo: Path, folder: Path) -> None:
    """report.png: the README's; report-compared.png; report-figures.png."""
    folder = folder.resolve()
    os.chdir(demo.parent)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        one, two = Path(place) / "one.html", Path(place) / "two.html"
        scores = Path(demo.name) / "scores"
        seecal.report(scores / "before", out=one)
        seecal.report(scores / "before", scores / "after", out=two)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        top = "document.querySelector('.bar').style.position = 'static'; "
        shot(browser, one, folder / "report.png", do=top + records_sorted("mean-down"))
        shot(browser, two, folder / "report-compared.png", dark=True, do=records_sorted("place"))
        shot(browser, two, folder / "report-figures.png", height=900)
        shot(browser, two, folder / "report-phone.png", width=400, height=820, do=records_sorted("place"))
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "docs")
