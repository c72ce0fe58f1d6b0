"""Each fact stands in one place: another file that writes it again is named here with the place that has it."""

import ast
import re

import pytest

from seecal import constants
from tests.support.paths import ROOT

SOURCE = ROOT / "src" / "seecal"
FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}
KEYS = {constants.TOKEN_WEIGHTS, constants.LENGTH_COUNTS, constants.RECORD_IDS, constants.CONTRAST_PREFIX}

# What code (not comments, not docstrings, not messages) says, and the files that may say it.
PLACES = {
    "names of configurations' image ids": (
        r"""["'](?:image|video)_(?:token|patch)_(?:id|index)["']""",
        {"families/table.py"},
    ),
    "the model inside DDP and PEFT": (
        r"\bget_base_model\b|\.module\.module\b|DistributedDataParallel\b",
        {"families/table.py"},
    ),
    "quiet libraries": (
        r"set_verbosity_error|disable_progress_bars?\b|redirect_stderr|filterwarnings\(.ignore",
        {"verbosity.py"},
    ),
    "what CAL keeps on a model": (r"""["']_seecal["']""", {"core/state.py"}),
    "how a text marks an image": (r"""=\s*["']<image>["']""", {"data/image_placement.py", "models/micro.py"}),
}


def code_of(text):
    """The code as Python would write it again: without comments, docstrings and the words of errors."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
        if isinstance(node, ast.Raise):
            node.exc = node.cause = None
    return ast.unparse(tree)


def ignored_labels(code):
    """Lines of code that write the number of an ignored label out."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and node.operand.value == -constants.IGNORE_INDEX
    ]


def batch_keys(code):
    """Lines of code that write a batch's key out; a table of a package's names is not one."""
    tree = ast.parse(code)
    named = {
        id(name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_loader.attach"
        for name in ast.walk(node)
    }
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in KEYS)
    return [node.lineno for node in found if id(node) not in named]


def test_both_are_found_where_they_are():
    code = f'x = labels != {constants.IGNORE_INDEX}\ny = batch["{constants.TOKEN_WEIGHTS}"]'
    assert (ignored_labels(code), batch_keys(code)) == ([1], [2])


@pytest.mark.parametrize("name", [name for name in FILES if name != "constants.py"])
def test_the_ignored_label_and_the_batch_keys_are_written_once(name):
    text = FILES[name].read_text("utf8")
    assert not ignored_labels(text), f"{name}: take IGNORE_INDEX from seecal.constants"
    assert not batch_keys(text), f"{name}: take the key from seecal.constants"


@pytest.mark.parametrize("what", PLACES)
def test_a_fact_is_written_where_it_belongs_and_nowhere_else(what):
    pattern, places = PLACES[what]
    found = {name for name, path in FILES.items() if re.search(pattern, code_of(path.read_text("utf8")))}
    assert found <= places, f"{what}: {sorted(found - places)} say again what {sorted(places)} has"
    assert found, "the pattern finds nothing any more"


def test_a_fact_that_is_doubled_is_seen():
    doubled = 'def f(config):\n    """image_token_id"""\n    return getattr(config, "image_token_id")  # again'
    pattern, _ = PLACES["names of configurations' image ids"]
    assert re.search(pattern, code_of(doubled))
    assert not re.search(pattern, code_of('"""\'image_token_id\'"""\nraise ValueError("set \'image_token_id\'")'))
