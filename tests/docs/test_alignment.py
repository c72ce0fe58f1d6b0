"""docs/alignment.md: its commands and its Python run, its families are those of the table, its picture is there."""

import re
import shlex

import pytest
from PIL import Image
from typer.testing import CliRunner

from seecal.cli.main import app
from seecal.families.table import FAMILIES
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "alignment.md").read_text("utf8")
(SHELL,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in SHELL.splitlines():
            done = CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
            assert done.exit_code == 0, line
    return folder


def test_the_commands_run(place):
    for name, sides in (("alignment.html", 2), ("both.html", 2)):
        text = (place / name).read_text("utf8")
        assert text.count('class="side"') == sides


def test_the_python_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    exec(PYTHON, {})
    shape, word = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"\(\d+, 4, 4\)", shape)
    assert re.fullmatch(r"\('\w+', -?0\.\d+\)", word)


def test_the_families_are_those_with_a_grid():
    table = "\n".join(line for line in PAGE.split("## Families")[1].splitlines() if line.startswith("| "))
    named = re.findall(r"`(\w+)`", table)
    assert set(named) == {name for name, family in FAMILIES.items() if family.grid is not None}


def test_the_picture_is_there():
    with Image.open(ROOT / "docs" / "alignment.png") as picture:
        assert picture.width > 1000
