"""What imports what goes downward only, and the light modules stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "seecal"

# A module may import from the layers above its own line, never from its own line or below.
LAYERS = [
    {"options", "blank", "segments", "fp8", "ranks", "linear_ce", "bench", "compute", "recipe_types"},
    {"slots"},
    {"packing"},
    {
        "data.paths",
        "data.turns",
        "data.processing",
        "data.emoji",
        "data.contrasts",
        "data.lengths",
        "data.pixels",
        "data.reduced",
        "data.runs",
        "models.efficientnet_lite",
    },
    {
        "families",
        "weighting",
        "config",
        "metrics",
        "selftest",
        "data.images",
        "data.placeholders",
        "models.micro",
        "models.loading",
    },
    {"main_pass", "stages", "data.records", "data.collator"},
    {"contrast"},
    {"delta"},
    {"forward", "trl_fit", "data.formats", "data.readers", "data.mixture", "data.checked"},
    {"trainer", "family_check", "recipe", "chat", "measure", "data.sources"},
    {"demo_report", "stage_trainer", "train_help"},
    {"train"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
# Third-party packages that a layer may not touch.
TORCH_ONLY = {"options", "weighting", "segments", "slots", "fp8", "linear_ce", "ranks", "selftest", "metrics"}
NO_TRL = {"forward", "contrast", "main_pass", "families", "packing", "data.collator", "data.images", "models.micro"}


def modules():
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, path


def imports_of(name, path, top_level_only=False):
    """(seecal modules, third-party packages) that the file imports anywhere in it, or at its top level only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["seecal", *name.split(".")[:-1]]
    inner, outer = set(), set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names] if module.startswith("seecal") else [module]
        else:
            continue
        for one in found:
            (inner if one.split(".")[0] == "seecal" else outer).add(one)
    known = {known for known, _ in modules()}
    inside = {part for one in inner for part in known if f"{one}.".startswith(f"seecal.{part}.")}
    return inside - {name}, {one.split(".")[0] for one in outer}


def layer_of(name):
    return next((index for index, names in enumerate(LAYERS) if name in names), None)


def test_every_module_has_a_layer():
    assert {name for name, _ in modules()} == set().union(*LAYERS), "put a new module into LAYERS"


@pytest.mark.parametrize(("name", "path"), [*modules()], ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_downward_only(name, path):
    inner, outer = imports_of(name, path)
    for other in inner:
        assert layer_of(other) < layer_of(name), f"{name} imports {other}, which is not below it"
    if name in TORCH_ONLY:
        assert not outer & {"transformers", "trl", "peft", "accelerate", "datasets"}
    if name in NO_TRL:
        assert "trl" not in outer


def test_the_graph_is_read_at_all():
    inner, _ = imports_of("forward", SOURCE / "forward.py")
    assert {"contrast", "weighting", "linear_ce", "options", "families", "ranks"} <= inner


def test_import_seecal_is_light():
    code = "import sys, seecal; dir(seecal); print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_loads_and_others_do_not():
    code = "import seecal; [getattr(seecal, name) for name in seecal.__all__]; seecal.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "AttributeError: module 'seecal' has no attribute 'nothing'" in done.stderr
