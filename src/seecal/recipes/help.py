"""``seecal train --help`` without torch: the fields are read off the source of config.py, not imported."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from typing import Any

from .recipe import KEYS, NOT_HERE, SHIPPED

_USAGE = """Usage: seecal train --config RECIPE [--resume] [--key value ...]
       accelerate launch --config_file "$(seecal accelerate-config fsdp2)" -m seecal train --config RECIPE

  Train a vision-language model with CAL, in one or more stages (docs/recipes.md).

  RECIPE is a YAML file, or the name of one of ours: {recipes}.
  (tiny trains what seecal tiny-folder writes.)
  Every key can be set on the command line: --learning_rate 1e-5 for all stages, --stages.2.learning_rate 1e-5 for one
  (they are counted from 1), --lora.r 32 inside a mapping.

Options:
  --config RECIPE     The recipe; without it, the keys on the command line are all.
  --resume            Continue the run in output_dir at its stage and step (starts it if there is none). Without it, a
                      folder that holds a run is refused.
  --help              This text.
  --help-all          The fields inherited from TRL and transformers too."""


def text(everything: bool = False) -> str:
    """The help: options, keys of the recipe, fields of CALConfig; with ``everything`` the inherited fields too."""
    recipes = ", ".join(sorted(one.stem for one in SHIPPED.glob("*.yaml")))
    parts = [_USAGE.format(recipes=recipes), "\nKeys of a recipe:"]
    parts += [_entry(name, f"{key.help}{_where(key.where)}") for name, key in KEYS.items()]
    parts += ["\nCAL:", *(_entry(name, f"{help} Default: {default}.") for name, default, help in config_fields())]
    if not everything:
        return "\n".join([*parts, "\nAnd every argument of TRL's SFTConfig: seecal train --help-all"])
    import dataclasses

    from ..trainer.cal_config import CALConfig

    own = {name for name, _, _ in config_fields()}
    parts.append("\nInherited from TRL's SFTConfig and transformers' TrainingArguments:")
    for one in sorted(dataclasses.fields(CALConfig), key=lambda one: one.name):
        if one.name not in {*own, *KEYS, *NOT_HERE}:
            parts.append(_entry(one.name, " ".join(str(one.metadata.get("help", "")).split())))
    return "\n".join(parts)


def config_fields() -> list[tuple[str, Any, str]]:
    """(name, default, help text) of the fields that CALConfig adds, from its source and that of CALOptions."""
    here = Path(__file__).parents[1]
    defaults = {
        node.target.id: ast.literal_eval(node.value)
        for node in _class_body(here / "core/options.py", "CALOptions")
        if isinstance(node.target, ast.Name) and node.value is not None
    }
    found = []
    for node in _class_body(here / "trainer/cal_config.py", "CALConfig"):
        if not isinstance(node.value, ast.Call) or not isinstance(node.target, ast.Name):
            continue
        name, call = node.target.id, node.value
        if len(call.args) == 2:  # _option(name, help)
            found.append((name, defaults[name], ast.literal_eval(call.args[1])))
        else:  # field(default=..., metadata={"help": ...})
            given = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
            found.append((name, given["default"], given["metadata"]["help"]))
    return found


def _class_body(path: Path, name: str) -> list[ast.AnnAssign]:
    tree = ast.parse(path.read_text("utf8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return [node for node in found.body if isinstance(node, ast.AnnAssign)]


def _where(where: str) -> str:
    return {"top": " (top level only)", "stage": " (in a stage only)"}.get(where, "")


def _entry(name: str, help: str) -> str:
    indent = " " * 22
    lead = f"  --{name:<18}" if len(name) < 18 else f"  --{name}\n{indent}"
    return lead + textwrap.fill(help, 118, initial_indent=indent, subsequent_indent=indent).lstrip()
