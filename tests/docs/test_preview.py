"""docs/preview.md: its commands and its Python run, its checks are those that there are, its pictures are there."""

import re
import shlex

import pytest
from PIL import Image
from typer.testing import CliRunner

from seecal.cli.main import app
from seecal.scoring.previewed import KINDS
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "preview.md").read_text("utf8")
(SHELL,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the page's commands have been run, in order, and what each printed."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = [CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False) for line in SHELL.splitlines()]
    assert [done.exit_code for done in said] == [0] * 4
    return folder, [done.stdout for done in said]


def test_the_commands_run(place):
    folder, (_, whole, measured, cut) = place
    assert "64 records looked at, all there are: every check passed" in whole
    assert whole.count("<|start|>assistant") == 4
    assert "Δ (weight)" in measured
    assert (folder / "preview.html").read_text("utf8").count('class="preview"') == 2
    assert "tiny, stage 1 of 2 (align)" in cut
    assert "max_length: 40" in cut
    assert re.search(r"the first 20 records looked at: \d+ failed a check", cut)
    assert "is longer than max_length: cut" in cut


def test_the_python_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place[0])
    exec(PYTHON, {})
    said = capsys.readouterr().out
    assert "⟦It is" in said
    assert re.search(r"failed a check \[\('long', \d+\)\]", said)


def test_the_checks_are_those_that_there_are():
    table = PAGE.split("## The checks")[1]
    assert re.findall(r"^\| `([\w ]+)` \|", table, re.M) == list(KINDS)


@pytest.mark.parametrize("name", ["preview.png", "preview-terminal.png"])
def test_the_pictures_are_there(name):
    with Image.open(ROOT / "docs" / name) as picture:
        assert picture.width > 1000
