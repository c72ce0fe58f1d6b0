"""Take the pictures of docs/preview.md: what seecal preview shows of the demo's recipe, as a page and in a terminal.

    python -m scripts.preview_pictures SEECAL-DEMO [FOLDER]

SEECAL-DEMO is the folder that `seecal demo` leaves; FOLDER is docs. Δ is that of the model with which its second stage
begins. Needs playwright.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from scripts.screenshots import shot

import seecal
from seecal.pages.preview_text import show

WIDTH = 104  # characters of the terminal
# A line is as high as the font, so that the halves of a picture touch
_TERMINAL = """<meta charset="utf-8"><style>{stylesheet} body {{ margin: 0; background: #16181d; color: #d8dbe0 }}
pre {{ margin: 14px; font: 14px/16.3px "DejaVu Sans Mono", monospace }}</style><pre>{code}</pre>"""


def terminal(preview: Any) -> str:
    """What a terminal with all colours shows, as HTML."""
    console = Console(
        file=io.StringIO(), force_terminal=True, color_system="truecolor", no_color=False, width=WIDTH, record=True
    )
    show(preview, console)
    return console.export_html(theme=DIMMED_MONOKAI, code_format=_TERMINAL)


def main(demo: Path, folder: Path) -> None:
    """preview.png and preview-terminal.png."""
    folder = folder.resolve()
    os.chdir(demo.parent)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        page, text = Path(place) / "page.html", Path(place) / "terminal.html"
        options: dict[str, Any] = {"model": f"{demo.name}/run/stage-1/model", "check": 100}
        seecal.preview(f"{demo.name}/recipe.yaml", records=2, html=page, **options)
        text.write_text(terminal(seecal.preview(f"{demo.name}/recipe.yaml", records=1, **options)), "utf8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shot(browser, page, folder / "preview.png", height=960)
        shot(browser, text, folder / "preview-terminal.png", width=930, height=640)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parents[1] / "docs")
