"""docs/architecture.md: its tree is the disk's, its list of imports is the one that is tested, its names are there."""

import ast
import re
from fnmatch import fnmatch

from scripts.architecture_page import PAGE, with_imports

from tests.test_imports import SOURCE, modules

TEXT = PAGE.read_text("utf8")


def listed():
    """The tree's entries as paths below src/seecal; folders end in a slash."""
    lines = TEXT.split("```")[1].strip().splitlines()[1:]
    above, found = [], []
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name = line.split()[0]
        found.append("".join(above[:depth]) + name)
        above[depth:] = [name] if name.endswith("/") else []
    return found


def on_disk():
    """Every file and folder below src/seecal, but for the packages' own files and what Python leaves."""
    for path in SOURCE.rglob("*"):
        name = path.relative_to(SOURCE).as_posix()
        if "__pycache__" not in name and not name.endswith("/__init__.py"):
            yield name + "/" * path.is_dir()


def test_the_tree_is_the_disks():
    names, there = listed(), set(on_disk())
    assert len(names) == len(set(names))
    for name in names:
        assert any(fnmatch(path, name) for path in there), f"{name} is in the tree and not on the disk"
    missing = {path for path in there if not any(fnmatch(path, name) for name in names)}
    assert not missing, f"put into the tree of docs/architecture.md: {sorted(missing)}"


def test_every_folder_and_file_is_described():
    for line in TEXT.split("```")[1].strip().splitlines():
        name, *rest = line.split(maxsplit=1)
        assert rest or not name.endswith((".py", "s/")), f"{name}: say in a few words what it is"


def test_the_imports_are_those_that_are_tested():
    assert with_imports(TEXT) == TEXT, "docs/architecture.md is out of date: python -m scripts.architecture_page"


def test_every_function_that_is_named_is_there():
    """`file.function`, where file is one of ours; and `folder/file.py`."""
    files = {}
    for name, path in modules():
        files.setdefault(name.split(".")[-1], []).append(path)
    checked = 0
    for stem, function in re.findall(r"`([a-z_]\w*)\.(\w+)(?:\(\))?`", TEXT):
        if function == "py" or stem not in files:
            continue
        trees = [ast.parse(path.read_text("utf8")) for path in files[stem]]
        defined = {
            node.name for tree in trees for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        assert function in defined, f"{stem}.{function}"
        checked += 1
    assert checked > 25
    for file in re.findall(r"`([a-z_/]+\.py)`", TEXT):
        above = SOURCE.parents[1] if file.startswith("tests/") else SOURCE
        assert (above / file).exists() or file.removesuffix(".py") in files, file
