"""``seecal train --help`` without torch: what CALConfig adds stands in dataclasses that need none."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from ..core.options import CALOptions
from ..data.options import DataOptions
from ..trainer.options import AnswerOptions, HangOptions, LoggingOptions
from .layers import SHIPPED
from .recipe import KEYS, NOT_HERE

_USAGE = """Usage: seecal train --config RECIPE [--resume | --dry-run] [--key value ...]
       accelerate launch --config_file "$(seecal accelerate-config fsdp2)" -m seecal train --config RECIPE

  Train a vision-language model with CAL, in one or more stages (docs/recipes.md).

{recipes}
  (tiny trains what seecal tiny-folder writes.)
  Every key can be set on the command line: --learning_rate 1e-5 for all stages, --stages.2.learning_rate 1e-5 for one
  (they are counted from 1), --lora.r 32 inside a mapping.

Options:
  --config RECIPE     The recipe; without it, the keys on the command line are all.
  --resume            Continue the run in output_dir at its stage and step (starts it if there is none). Without it, a
                      folder that holds a run is refused.
  --dry-run           Try the whole recipe on the CPU in about a minute: few layers, random weights, two steps a stage.
                      Needs no GPU, model, data or network, writes nothing, and names what training would stop at.
  --help              This text.
  --help-all          The fields inherited from TRL and transformers too."""


def text(everything: bool = False) -> str:
    """The help: options, keys of the recipe, fields of CALConfig; with ``everything`` the inherited fields too."""
    names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    said = f"RECIPE is a YAML file, or the name of one of ours: {names}."
    recipes = textwrap.fill(said, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    parts = [_USAGE.format(recipes=recipes), "\nKeys of a recipe:"]
    parts += [_entry(name, f"{key.help}{_where(key.where)}") for name, key in KEYS.items()]
    parts += [
        "\nCAL:",
        *(_entry(name, f"{help} Default: {default}.") for name, default, help in config_fields() if name not in KEYS),
    ]
    if not everything:
        return "\n".join([*parts, "\nAnd every argument of TRL's SFTConfig: seecal train --help-all"])
    from ..trainer.cal_config import CALConfig

    own = {name for name, _, _ in config_fields()}
    parts.append("\nInherited from TRL's SFTConfig and transformers' TrainingArguments:")
    for field in sorted(dataclasses.fields(CALConfig), key=lambda field: field.name):
        if field.name not in {*own, *KEYS, *NOT_HERE}:
            parts.append(_entry(field.name, " ".join(str(field.metadata.get("help", "")).split())))
    return "\n".join(parts)


def config_fields() -> list[tuple[str, Any, str]]:
    """(name, default, help text) of the fields that CALConfig adds to TRL's."""
    groups = (CALOptions, DataOptions, LoggingOptions, AnswerOptions, HangOptions)
    fields = [field for options in groups for field in dataclasses.fields(options)]
    return [(field.name, field.default, field.metadata["help"]) for field in fields]


def _where(where: str) -> str:
    return {"top": " (top level only)", "stage": " (in a stage only)"}.get(where, "")


def _entry(name: str, help: str) -> str:
    indent = " " * 22
    lead = f"  --{name:<18}" if len(name) < 18 else f"  --{name}\n{indent}"
    return lead + textwrap.fill(help, 118, initial_indent=indent, subsequent_indent=indent).lstrip()
