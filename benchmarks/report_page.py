"""How long a browser takes to open a report page, and to search, sort and filter in it: seecal report on made-up scores.

open        from the start of loading until the first records stand there (performance.now in the page)
search      typing a word that a tenth of the records have, until the first records stand there
filter      only records with a contradictory token, and a range of mean Δ
sort        by mean Δ
page        the next page of records, whose numbers have not been read yet
compared    the same page with a second model's scores

Measured inside headless Chromium (the distribution's, never a downloaded one), opened from a file. Texts have 12 to 40
words.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import progress, write

import seecal

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.scored import llava_file, scored_folder

# Laying the page out again belongs to it
_TIMED = "(act) => { const t = performance.now(); act(); document.body.offsetHeight; return performance.now() - t; }"
_OPENED = "performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart"
ACTS = {
    "search": "() => { at('search').value = 'seventh'; update(); }",
    "filter": "() => { at('search').value = ''; at('only').value = 'against'; at('from').value = '0'; update(); }",
    "sort": "() => { at('only').value = ''; at('from').value = ''; at('sort').value = 'mean-down'; update(); }",
    "page": "() => { page += 40; show(); }",
}


def made_up(folder: Path, samples: int) -> tuple[Path, Path]:
    """Scores of so many records by two models."""
    draw = np.random.default_rng(0)
    words = [f"word{number}" for number in range(3000)]
    answers = [" ".join(draw.choice(words, draw.integers(12, 40))) + "." for _ in range(samples)]
    answers = [f"seventh {text}" if number % 10 == 7 else text for number, text in enumerate(answers)]
    data = llava_file(folder / "data", answers)
    return scored_folder(data, folder / "a"), scored_folder(data, folder / "b", seed=1, shift=1.0, model="b/model")


def opened(path: Path, rounds: int) -> dict[str, list[float]]:
    """What is timed → milliseconds of each round, each in a browser of its own."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise ValueError("no chromium is installed: apt install chromium")
    found: dict[str, list[float]] = {name: [] for name in ("open", *ACTS)}
    with sync_playwright() as playwright, progress().task("rounds", rounds) as task:
        for _ in range(rounds):
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.goto(path.as_uri())
            page.wait_for_selector(".record")
            found["open"].append(page.evaluate(_OPENED))
            for name, act in ACTS.items():
                found[name].append(page.evaluate(f"({_TIMED})({act})"))
            browser.close()
            task.advance()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="folder of the CSV (benchmarks/results)")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        first, second = made_up(Path(folder), options.samples)
        for what, other in (("one model", None), ("two models", second)):
            page = Path(folder) / "page.html"
            made = seecal.report(first, other, out=page)
            for name, times in opened(page, options.rounds).items():
                p20, p50, p80 = np.percentile(times, (20, 50, 80)).round(1)
                row = {
                    "page": what,
                    "samples": made.records,
                    "megabytes": round(made.bytes / 1e6, 1),
                    "images": made.images,
                }
                rows.append({**row, "what": name, "ms_p20": p20, "ms_p50": p50, "ms_p80": p80, "rounds": len(times)})
    write("report_page", rows, options.out)


if __name__ == "__main__":
    main()
