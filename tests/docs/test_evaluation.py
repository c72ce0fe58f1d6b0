"""docs/evaluation.md: its commands are those of the command line, its extra that of the package."""

import re
import shlex
import tomllib

import pytest
import typer

from seecal.cli.main import app
from seecal.evaluation.lmms_eval import INSTALL, RESULTS
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "evaluation.md").read_text("utf8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
OPTIONS = {option for one in typer.main.get_command(app).commands["eval"].params for option in getattr(one, "opts", ())}


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("seecal eval")])
def test_every_option_of_a_command_is_one(command):
    given = {word for word in shlex.split(command) if word.startswith("--")}
    assert "--tasks" in given
    assert given <= OPTIONS


def test_options_that_the_text_names_are_there():
    assert {"--limit", "--max-new-tokens", "--include-path"} <= set(re.findall(r"`(--[a-z-]+)", PAGE)) & OPTIONS


def test_the_command_that_installs_it_is_the_one_that_an_error_tells():
    assert INSTALL.replace("'seecal[lmms]'", "'.[lmms]'") in COMMANDS
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]["optional-dependencies"]
    (version,) = [line.removeprefix("lmms-eval==") for line in extras["lmms"] if line.startswith("lmms-eval")]
    assert f"lmms-eval) {version}" in PAGE


def test_the_files_that_the_page_names_are_those_that_are_written():
    assert f"`{RESULTS}`" in PAGE


def test_the_recorded_check_shows_one_accuracy_of_four_ways():
    found = re.findall(r"batch size 4 +(\d+) documents +exact (\S+)", PAGE)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert 0 < float(found[0][1]) < 1
