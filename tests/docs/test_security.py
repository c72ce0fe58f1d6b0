"""SECURITY.md: each promise names tests, and they are there."""

import re

import pytest

from seecal.data.images.decode import MAX_PIXELS
from seecal.data.paths import MAX_FILE_BYTES
from seecal.data.sources.bounds import MAX_BYTES, MAX_VALUES
from seecal.recipes import yaml_text
from tests.support.paths import ROOT

TEXT = (ROOT / "SECURITY.md").read_text("utf8")
_FILE = re.compile(r"(tests/[\w/]+\.py): ([\w, ]+)")


def promises():
    """(promise, its tests) of each row of the table."""
    table = TEXT.split("## Promised")[1].split("## Not promised")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] not in ("promise", "---")]


def test_there_are_promises():
    assert len(promises()) > 12
    assert all(len(row) == 2 for row in promises())


@pytest.mark.parametrize("row", promises(), ids=lambda row: row[0][:40])
def test_each_promise_names_tests_that_are_there(row):
    named = [(file, name.strip()) for file, names in _FILE.findall(row[1]) for name in names.split(",")]
    assert named
    left = _FILE.sub("", row[1]).replace(";", "").strip()
    assert left == "", "something that is no test"
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf8"), re.MULTILINE), (file, name)


def test_the_sizes_are_those_of_the_code():
    for size in (MAX_PIXELS, MAX_VALUES, yaml_text._LONGEST, yaml_text._MOST):
        assert f"{size:,}" in TEXT
    assert (MAX_FILE_BYTES, MAX_BYTES) == (512 << 20, 128 << 20)
    assert "512 MiB as a file" in TEXT
    assert "at most 128 MiB" in TEXT


def test_it_is_found_from_the_readme():
    assert "[SECURITY.md](SECURITY.md)" in (ROOT / "README.md").read_text("utf8")
