"""Every Python block of docs/data.md runs by itself, in an empty folder, and every format and key is on the page."""

import csv
import re

import pytest
from scripts.keys_table import section, with_section
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from seecal.data.sources.formats import FORMATS, KEYS
from seecal.data.sources.mixture import STOPPING
from seecal.data.sources.readers import READERS
from seecal.data.sources.records import FEATURES
from tests.support.paths import ROOT
from tests.support.tiny import tiny_llava_processor, tiny_records

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = [
    (PAGE[: found.start()].count("\n") + 1, found[1]) for found in re.finditer(r"```python\n(.*?)```", PAGE, re.S)
]


@pytest.mark.parametrize(("line", "code"), BLOCKS, ids=[f"line {line}" for line, _ in BLOCKS])
def test_the_block_runs(tmp_path, monkeypatch, line, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    known = dict(FORMATS)
    try:
        exec(compile("\n" * line + code, "docs/data.md", "exec"), {"__name__": "__main__"})
    finally:
        FORMATS.clear()
        FORMATS.update(known)


def test_everything_is_on_the_page():
    assert len(BLOCKS) > 10
    for name in (*FORMATS, *READERS, *STOPPING, *FEATURES):
        assert f"`{name}`" in PAGE, name


def test_the_table_of_keys_is_the_one_that_is_checked():
    assert with_section(PAGE) == PAGE, "docs/data.md is out of date: python -m scripts.keys_table"
    assert section().count("\n") == len(KEYS) + 1


def test_trl_labels_what_the_page_says_it_does():
    """Prompts and image tokens; when this fails, the page's last table is out of date."""
    processor = tiny_llava_processor()
    batch = DataCollatorForVisionLanguageModeling(processor)(tiny_records(1))
    assert ((batch["labels"] != -100) == (batch["attention_mask"] == 1)).all()
    assert (batch["labels"] == processor.tokenizer.convert_tokens_to_ids("<image>")).any()


def test_the_ratios_of_the_loader_are_those_of_its_figures():
    with (ROOT / "benchmarks" / "results" / "loader.csv").open(encoding="utf-8") as file:
        figures = {(row["files"], row["variant"]): row for row in csv.DictReader(file)}
    for files in ("640x480", "2000x1500"):
        ratios = " | ".join(f"{float(figures[files, name]['times_trl']):.2f}" for name in ("exact", "reduced"))
        assert f"| {files.replace('x', ' × ')} | {ratios} |" in PAGE
        assert figures[files, "exact"]["pixel_equal"] == "True"
