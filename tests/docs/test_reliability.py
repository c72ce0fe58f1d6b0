"""Every test that docs/reliability.md names is there."""

import re

from tests.support.paths import ROOT


def named():
    """(file, function or None) of each mention."""
    text = (ROOT / "docs" / "reliability.md").read_text("utf8")
    for line in text.splitlines():
        path = None
        for word in re.findall(r"tests/[\w/]+(?:\.py)?|\btest_\w+", line):
            if word.startswith("tests/"):
                path = word
                yield path, None
            elif path is not None:
                yield path, word


def test_the_tests_that_the_page_names_are_there():
    found = list(named())
    assert len(found) >= 50
    for path, function in found:
        file = ROOT / path
        assert file.exists(), path
        if function is not None:
            assert re.search(rf"^def {function}\(", file.read_text("utf8"), re.M), f"{path}: {function}"
