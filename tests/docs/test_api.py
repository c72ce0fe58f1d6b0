"""docs/api.md: written from the code, and every name that code outside may call is on it."""

import pytest
from scripts.api_page import PAGE, names, text

TEXT = PAGE.read_text("utf8")


def test_the_page_is_what_the_code_says():
    assert text() == TEXT, "docs/api.md is out of date: python -m scripts.api_page"


@pytest.mark.parametrize(("package", "found"), names().items(), ids=str)
def test_every_name_has_its_paragraph(package, found):
    section = TEXT.split(f"\n## {package}\n")[1].split("\n## ")[0]
    assert [line[4:] for line in section.splitlines() if line.startswith("### ")] == found
    assert "at 0x" not in section
