"""Facts that stand in one place: the label of what is not learnt, and the names of what a batch has beside the inputs."""

import ast

import pytest

from seecal import constants
from tests.support.paths import ROOT

SOURCE = ROOT / "src" / "seecal"
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "constants.py")
KEYS = {constants.TOKEN_WEIGHTS, constants.LENGTH_COUNTS, constants.RECORD_IDS, constants.CONTRAST_PREFIX}


def ignored_labels(code):
    """Lines of code, comments and docstrings aside, that write the number out."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and node.operand.value == -constants.IGNORE_INDEX
    ]


def batch_keys(code):
    return [node.lineno for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant) and node.value in KEYS]


def place(path):
    return str(path.relative_to(SOURCE))


def test_both_are_found_where_they_are():
    code = f'x = labels != {constants.IGNORE_INDEX}\ny = batch["{constants.TOKEN_WEIGHTS}"]'
    assert (ignored_labels(code), batch_keys(code)) == ([1], [2])


@pytest.mark.parametrize("path", FILES, ids=place)
def test_the_ignored_label_is_written_once(path):
    lines = ignored_labels(path.read_text("utf8"))
    assert not lines, f"{place(path)}, lines {lines}: take IGNORE_INDEX from seecal.constants"


@pytest.mark.parametrize("path", [path for path in FILES if place(path).startswith(("data", "trainer"))], ids=place)
def test_batch_keys_are_written_once(path):
    lines = batch_keys(path.read_text("utf8"))
    assert not lines, f"{place(path)}, lines {lines}: take the name from seecal.constants"
