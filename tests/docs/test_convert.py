"""docs/convert.md: its commands are commands, its numbers those of the code."""

import re
import shlex

import pytest
import torch
import typer

from seecal.cli.main import app
from seecal.models.assembly import grid_pinpoints
from seecal.models.compared import ROUNDING
from seecal.models.convert.configs import KEPT
from tests.support.paths import ROOT

PAGES = [(ROOT / "docs" / name).read_text("utf8") for name in ("convert.md", "paper.md")]
PAGE = PAGES[0]
NAMES = ("build-start", "convert", "merge", "export")
COMMANDS = [line for page in PAGES for line in page.splitlines() if re.match(rf"seecal ({'|'.join(NAMES)}) ", line)]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_parsed(line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    assert command.make_context(name, arguments).params


def test_all_four_are_there():
    assert {line.split()[1] for line in COMMANDS} == set(NAMES)


def test_the_numbers_are_the_codes():
    assert str(grid_pinpoints(336)) in PAGE
    for dtype in (torch.float32, torch.bfloat16):
        assert f"{ROUNDING[dtype]:.0e}".replace("e-0", "e-") in PAGE
    assert f"`{KEPT}`" in PAGE
