"""The house rules that can be checked: sizes, words, public names in what people read, children of the tests.

Each test collects all that is wrong, file and reason, so that one run shows the whole list.
"""

import ast
import importlib
import re

from tests.support.paths import ROOT
from tests.test_imports import SOURCE, modules

LONGEST_FILE, LONGEST_FUNCTION = 420, 65  # about 400 lines a file, about 60 a function
FOLDERS_OF_CODE = ("src", "tests", "benchmarks", "experiments", "scripts", "examples")
CODE = sorted(path for folder in FOLDERS_OF_CODE for path in (ROOT / folder).rglob("*.py"))
OURS = [path for path in CODE if SOURCE in path.parents]
TESTS = [path for path in CODE if ROOT / "tests" in path.parents]
EXAMPLES = [path for path in CODE if ROOT / "examples" in path.parents]
FOLDERS_OF_PAGES = (ROOT, ROOT / "docs", ROOT / "benchmarks", SOURCE / "models")
PAGES = sorted(path for folder in FOLDERS_OF_PAGES for path in folder.glob("*.md"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def text_of(path):
    return path.read_text("utf8")


def tree_of(path):
    return ast.parse(text_of(path))


def test_the_files_are_found():
    assert len(OURS) > 70
    assert len(TESTS) > 60
    assert len(EXAMPLES) > 5
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/api.md"} <= {name_of(path) for path in PAGES}


# ---- sizes ----


def too_long(path):
    if (lines := len(text_of(path).splitlines())) > LONGEST_FILE:
        yield f"{name_of(path)}: {lines} lines, split it where its second subject begins"
    for node in ast.walk(tree_of(path)):
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function and (lines := node.end_lineno - node.lineno + 1) > LONGEST_FUNCTION:
            yield f"{name_of(path)}: {node.name} has {lines} lines, split it"


def test_files_and_functions_stay_short():
    assert [line for path in CODE for line in too_long(path)] == []


# ---- words ----

# Words of our own for which the field has one, and that one.
PRIVATE_WORDS = {
    "slot": "token or token position; a slot is the KV cache's",
    "slots": "tokens or token positions; slots are the KV cache's",
    "blank": "dummy (image)",
    "reach": "has_contrast",
    "taken": "gather",
    "blamed": "explain",
    "classs": "class",
}


def words_of(identifier):
    """gather_tokens, GatherTokens and reach_N by their words."""
    camel = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
    return {word.lower() for part in identifier.split("_") for word in camel.findall(part)}


def identifiers(tree):
    """Every name that the code defines or uses."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(found := getattr(node, field, None), str):
                yield found


def private_words(path):
    for name in sorted(set(identifiers(tree_of(path)))):
        for word in sorted(words_of(name) & PRIVATE_WORDS.keys()):
            if "cache" not in name.lower():
                yield f"{name_of(path)}: {name}, instead of {word}: {PRIVATE_WORDS[word]}"
        if name == "Without":
            yield f"{name_of(path)}: {name}: ContrastOutput"


def test_names_are_the_fields_words():
    assert [line for path in OURS for line in private_words(path)] == []


def test_words_are_seen_inside_names():
    assert words_of("slots_BT") == {"slots", "bt"}
    assert words_of("BlankImage") == {"blank", "image"}
    assert words_of("reached") == {"reached"}
    names = set(identifiers(ast.parse("def slot(reach, *blank): return f(taken=x.blamed)")))
    assert names == {"slot", "reach", "blank", "f", "taken", "x", "blamed"}


def test_pages_use_the_fields_words():
    found = [
        f"{name_of(path)}:{number}: {line}"
        for path in PAGES
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if re.search(r"\b(slots?|blank images?)\b", line, re.I) and "cache" not in line
    ]
    assert found == []


# ---- public names ----


def handed_on(name):
    """Whether the module's package hands it on, as seecal.families does with dummy_images."""
    package, _, leaf = name.rpartition(".")
    return leaf in getattr(importlib.import_module(f"seecal.{package}"), "__all__", ())


_MODULES = sorted((name for name, _ in modules() if "." in name and not handed_on(name)), key=len, reverse=True)
# seecal.core.forward, but not seecal.core nor seecal.core.enable_cal: those the package hands on
PRIVATE_PATH = re.compile(rf"\bseecal\.(?:{'|'.join(map(re.escape, _MODULES))})\b")


def messages_of(tree):
    """Strings that a user may see: no docstrings, and not the name of a module that is to be imported."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parent = parents.get(node)
            imported = isinstance(parent, ast.Call) and ast.unparse(parent.func).endswith("import_module")
            if not imported and not isinstance(parent, ast.Expr):
                yield node.value


def test_what_people_read_uses_public_names():
    read = [(path, text_of(path)) for path in (*PAGES, *EXAMPLES)]
    said = [(path, message) for path in OURS for message in messages_of(tree_of(path))]
    assert [(name_of(path), found) for path, text in (*read, *said) if (found := PRIVATE_PATH.findall(text))] == []


def test_a_private_path_is_seen():
    assert PRIVATE_PATH.findall("from seecal.core.forward import x; seecal.data.collators.vision.f") == [
        "seecal.core.forward",
        "seecal.data.collators.vision",
    ]
    assert not PRIVATE_PATH.findall("seecal.core.enable_cal seecal.core seecal.trainer.GradientCheck")
    code = '"doc"\nimport_module("seecal.core.forward")\nraise E(f"see {x} and y")'
    assert list(messages_of(ast.parse(code))) == ["see ", " and y"]


# ---- links and paths ----

_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_FILE = re.compile(r"(?<![\w/])(?:tests|docs|examples|scripts|benchmarks|src)/[\w/-]+\.(?:py|md|yaml)\b")
_GONE = re.compile(r"\btests/(?:unit|e2e|page|distributed)\b|\baccelerate_configs/")


def dead_ends(path):
    text = text_of(path)
    links = _LINK.findall(text) if path.suffix == ".md" else []
    yield from (link for link in links if not link.startswith("https://") and not (path.parent / link).exists())
    yield from (named for named in _FILE.findall(text) if not (ROOT / named).exists())
    yield from _GONE.findall(text)


def test_links_and_paths_lead_somewhere():
    read = [path for path in (*PAGES, *CODE) if path != ROOT / "tests" / "test_house.py"]
    assert [(name_of(path), found) for path in read if (found := list(dead_ends(path)))] == []


# ---- the tests themselves ----


def careless_children(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("subprocess.run", "subprocess.Popen"):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if "env" not in given:
                yield f"{name_of(path)}:{node.lineno}: env=environment() of tests/support/processes.py"
            if ast.unparse(node.func) == "subprocess.run" and "limit(" not in given.get("timeout", ""):
                yield f"{name_of(path)}:{node.lineno}: timeout=limit() of tests/support/processes.py"
    if path.name != "processes.py" and re.search(r"\{\*\*os\.environ\b", text_of(path)):
        yield f"{name_of(path)}: environment() of tests/support/processes.py instead of os.environ"


def test_children_get_the_tested_code_and_a_limit():
    here = ROOT / "tests" / "test_house.py"
    assert [line for path in TESTS if path != here for line in careless_children(path)] == []


def test_the_tests_mirror_the_folders():
    """tests/core/test_packing.py for core/packing.py, and nothing that looks like a test among the helpers."""
    folders = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*") if path.is_dir()}
    here = {path.parent.relative_to(ROOT / "tests").as_posix() for path in TESTS}
    assert here - folders == {".", "benchmarks", "docs", "experiments", "fuzz", "support"}
    assert not list((ROOT / "tests" / "support").glob("test_*.py"))
