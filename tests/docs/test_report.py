"""docs/report.md: its commands and its Python run, what it says of the page is there, its pictures are."""

import re
import shlex

import pytest
from PIL import Image
from typer.testing import CliRunner

import seecal
from seecal.cli.main import app
from tests.support.paths import ROOT
from tests.support.scored import llava_file, scored_folder

PAGE = (ROOT / "docs" / "report.md").read_text("utf8")
(SHELL,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with scores of the names that the page's commands have, in which they have been run."""
    folder = tmp_path_factory.mktemp("page")
    data = llava_file(folder / "data", ["A red cat.", "Two blue dogs."])
    for seed, name in enumerate(("scores", "before", "after")):
        scored_folder(data, folder / name, seed=seed, model=f"{name}/model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in SHELL.splitlines():
            done = CliRunner().invoke(app, shlex.split(line, comments=True)[1:], catch_exceptions=False)
            assert done.exit_code == 0, line
    return folder


def test_the_commands_run(place):
    assert len(SHELL.splitlines()) == 2
    one, two = ((place / name).read_text("utf8") for name in ("report.html", "compared.html"))
    assert "scores/model" in one
    assert "before/model" in two
    assert "after/model" in two
    assert (one.count("<svg"), two.count("<svg")) == (4, 8)


def test_the_python_runs(place, monkeypatch):
    (call,) = re.findall(r"`(seecal\.report\(.*?\))`", PAGE)
    monkeypatch.chdir(place)
    (place / "report.html").unlink()
    assert eval(call, {"seecal": seecal}).records == 2
    assert (place / "report.html").exists()


def test_what_it_says_of_the_page_is_there(place):
    two = (place / "compared.html").read_text("utf8")
    for words in ("Where Δ lies", "Most visual words", "Least visual words", "Most contradictory tokens", "B − A"):
        assert words in two
    (keys,) = re.findall(r"^Keys: .*$", PAGE, re.M)
    footer = two.split("<footer>")[1].split("</footer>")[0]
    for key in re.findall(r"`(.)`", keys):
        assert f"<kbd>{key}</kbd>" in footer


def test_the_default_budget_is_that_of_the_command():
    (megabytes,) = re.findall(r"`--budget-mb` \((\d+) by default\)", PAGE)
    help_of = CliRunner().invoke(app, ["report", "--help"]).output
    assert re.search(rf"--budget-mb .*\[default: {megabytes}\.0", " ".join(help_of.split()))


def test_the_pictures_are_there():
    for name in re.findall(r"!\[.*?\]\((.*?\.png)\)", PAGE):
        with Image.open(ROOT / "docs" / name) as picture:
            assert picture.width > 600
