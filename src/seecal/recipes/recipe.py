"""A recipe: the YAML file and command line of ``seecal train``, checked and resolved into stages.

What a key is set to, the strongest first: ``--stages.2.key`` on the command line, ``--key`` there (all stages), the stage's
own entry in the file, the file's top level, the default. Nothing here imports torch until a recipe is really read.
"""

from __future__ import annotations

import functools
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .layers import SHIPPED, load, preset_settings, unknown
from .overrides import arguments, override_stage, put
from .schema import checked
from .stage_checks import check_numbers, check_settings

if TYPE_CHECKING:
    from ..trainer.cal_config import CALConfig
    from .trainable import LoraSettings

__all__ = ["KEYS", "NOT_HERE", "SHIPPED", "Key", "Recipe", "Source", "Stage", "arguments", "load", "read", "unknown"]


@dataclass(frozen=True)
class Key:
    """A key of the recipe that is not a field of CALConfig: its type, its help text, and where it may stand."""

    type: Any
    help: str
    where: str = "both"  # "top": not in a stage; "stage": only there


KEYS: dict[str, Key] = {
    "model": Key(str, "Folder of a vision-language model, or its hub id.", "top"),
    "output_dir": Key(str, "Where stages, checkpoints and the final model go.", "top"),
    "extends": Key(str, "In a file: another recipe, by name or path. What is not set here stands there.", "top"),
    "architecture": Key(
        str | None,
        "A known configuration, such as llava-1.5-7b: what seecal plan and --dry-run take the sizes from while the model's "
        "folder is not there.",
        "top",
    ),
    "stages": Key(list, "Stages, trained one after another; each is the top level with its own keys put in.", "top"),
    "model_init_kwargs": Key(dict, "Arguments of from_pretrained, such as {dtype: bfloat16}. Default: float32.", "top"),
    "name": Key(str, "What the stage is called in messages.", "stage"),
    "data": Key(
        str | list | dict,
        "Training data: a path, {path, format, image_root, weight, split, columns, follow_links}, or a list of these to "
        "mix.",
    ),
    "eval_data": Key(str | list | dict | None, "Evaluation data, as data. Measured at the end of each stage."),
    "streaming": Key(bool, "Read the data as it is needed instead of indexing it first; needs max_steps."),
    "on_bad": Key(
        str,
        "A record that cannot be used: error stops, skip puts it aside in output_dir/quarantine.jsonl; in a batch another "
        "takes its place. Default: error.",
    ),
    "skip_records": Key(
        str | None,
        "A quarantine.jsonl of seecal check-data or of a run: its records are left out of the training data.",
    ),
    "train": Key(
        str | list[str],
        "What trains: projector, language_model, vision_tower, image_newline, lm_head, lora. Default: projector, and lora "
        "if lora is set, else language_model.",
    ),
    "freeze": Key(
        str | list[str] | None,
        "What stays frozen inside the groups that train: embeddings, the word table, and a lm_head that is tied to it.",
    ),
    "learning_rates": Key(dict[str, float] | None, "Learning rates of single groups, such as {vision_tower: 2.0e-6}."),
    "lora": Key(dict | None, "Adapters: {r: 16, alpha: 32, dropout: 0.0, target: language_model}."),
    "preset": Key(
        str,
        "Several of CAL's options by one name; those that are set beside it win. released: what the paper's code computes "
        "where it departs from its equations (normalize: micro_batch, pool_scope: released, contrast: mask).",
    ),
    "chat_template": Key(
        str | None,
        "Used instead of the model's in this stage: Jinja text, a .jinja file, or one that comes with seecal (plain, "
        "vicuna_v1, gemma, paligemma).",
    ),
    "cache_vision_features": Key(
        bool,
        "Run the frozen vision tower once for each image and keep its features, 2 GiB of them at most. Default: false.",
    ),
    "check_gradients": Key(bool, "Stop at the first step if a trained tensor got no gradient. Default: true."),
}
_DEFAULTS: dict[str, Any] = {
    "streaming": False,
    "on_bad": "error",
    "skip_records": None,
    "cache_vision_features": False,
    "check_gradients": True,
}
# Fields of CALConfig that the whole run shares: one process cannot change them between stages
RUN_WIDE = ("bf16", "fp16", "tf32", "use_cpu", "fsdp", "fsdp_config", "deepspeed", "ddp_backend", "accelerator_config")
# Fields of SFTConfig that would do nothing, or something else than they say, in `seecal train`
NOT_HERE = {
    "resume_from_checkpoint": "continue a run with --resume",
    "trust_remote_code": "seecal runs no code out of a model's folder",
    "enable_jit_checkpoint": "seecal train saves a checkpoint at SIGTERM by itself",
    "chat_template_path": "set chat_template",
    "parallelism_config": "choose the launch with accelerate launch --config_file",
    "do_train": "seecal train always trains",
    "do_eval": "set eval_data",
    "do_predict": "set eval_data",
}


@dataclass(frozen=True)
class Source:
    """One data set: where it lies and how it is written (None: told from the data), and its share of a mixture.

    ``format``, ``image_root``, ``split``, ``columns`` and ``follow_links`` are those of :func:`seecal.load_records`.
    """

    path: str
    format: str | None = None
    image_root: str | list[str] | None = field(default=None, hash=False)
    weight: float | None = None
    split: str | None = None
    columns: dict[str, str | None] | None = field(default=None, hash=False)
    follow_links: bool = False

    def options(self) -> dict[str, Any]:
        """What :func:`seecal.load_records` is told of it."""
        names = ("format", "image_root", "split", "columns", "follow_links")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Stage:
    """One stage, all of it known. ``number`` counts from 1; ``settings`` are the fields of CALConfig that were set."""

    number: int
    name: str
    train: tuple[str, ...]
    freeze: tuple[str, ...]
    lora: LoraSettings | None
    learning_rates: dict[str, float]
    data: tuple[Source, ...]
    eval_data: tuple[Source, ...]
    streaming: bool
    on_bad: str
    skip_records: str | None
    chat_template: str | None
    cache_vision_features: bool
    check_gradients: bool
    settings: dict[str, Any] = field(repr=False)

    def config(self, output_dir: Path) -> CALConfig:
        """The CALConfig of the stage, through TRL's parser. ValueError for values that contradict each other."""
        from trl import TrlParser

        from ..core.weighting import passes_read
        from ..trainer.cal_config import CALConfig

        parser = TrlParser(CALConfig)  # type: ignore[arg-type]  # its annotation is the union's name, not a type
        # Every trained tensor has a gradient in every step (GradientCheck), so DDP need not look for others
        fixed = {
            "ddp_find_unused_parameters": False,
            **self.settings,
            "on_bad": self.on_bad,
            "output_dir": str(output_dir),
        }
        parser.set_defaults_with_config(**fixed)
        try:
            config = parser.parse_args_into_dataclasses(args=[])[0]
        except ValueError as error:
            if "use_cpu" not in str(error):
                raise
            raise ValueError("no GPU was found here: set use_cpu: true and bf16: false to train on the CPU") from None
        except SystemExit:  # argparse has said on stderr what it dislikes
            raise ValueError(f"stage {self.number}: these settings are not accepted: {self.settings}") from None
        # A weighting of the user's own may lie in the folder that the command runs in. Only for this import, and last: a
        # folder such as "wandb" there must not pass for a package.
        here = [] if str(Path.cwd()) in sys.path else [str(Path.cwd())]
        sys.path.extend(here)
        try:
            passes_read(config.weighting)
        finally:
            for one in here:
                sys.path.remove(one)
        check_settings(self, config)
        return config


@dataclass(frozen=True)
class Recipe:
    """Everything ``seecal train`` needs. ``resolved`` is itself a recipe, with nothing left to merge."""

    model: str
    output_dir: Path
    model_init_kwargs: dict[str, Any]
    stages: tuple[Stage, ...]
    resolved: dict[str, Any] = field(repr=False)
    architecture: str | None = None

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.resolved, sort_keys=False, allow_unicode=True)


def read(config: str | None, overrides: Sequence[tuple[str, list[str]]] = ()) -> Recipe:
    """The recipe of a file (or of a shipped one by name) and the command line's overrides.

    Args:
        config: path of a YAML file, or the name of a recipe in ``seecal/recipes``; None: the overrides are all.
        overrides: (dotted key, the values behind it).

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the key: unknown (with the nearest known one), of a wrong type, missing, or in conflict.
    """
    top = load(config) if config else {}
    for_stages: list[tuple[str, Any]] = []
    for dotted, values in preset_settings(overrides):
        key = dotted.split(".")[0]
        if key == "extends":
            raise ValueError(
                "--extends: it stands in a recipe file. Give that recipe with --config, and settings beside it"
            )
        if key == "stages":
            override_stage(top, dotted, values)
        elif KEYS.get(key, KEYS["data"]).where == "top":
            top[key] = put({key: top.get(key)}, dotted, values)[key]
        else:
            for_stages.append((dotted, values))
    stages = top.pop("stages", None)
    if stages is not None and (
        not isinstance(stages, list) or not stages or not all(isinstance(s, dict) for s in stages)
    ):
        raise ValueError("stages: expected a list of mappings, one for each stage")
    run = {name: _checked(name, top[name]) for name in list(top) if KEYS.get(name, KEYS["data"]).where == "top"}
    base = {name: value for name, value in top.items() if name not in run}
    merged = []
    for number, own in enumerate(stages or [{}], 1):
        last = own.pop("", [])
        stage = {**base, **own}
        for dotted, values in [*for_stages, *last]:
            put(stage, dotted, values)
        local = {*own, *(dotted.split(".")[0] for dotted, _ in last)} if stages else set()
        prefixes = {name: f"stages.{number}." if name in local else "" for name in stage}
        merged.append({name: _checked(name, value, prefixes[name]) for name, value in stage.items()})
    for name in ("model", "output_dir"):
        if not run.get(name):
            raise ValueError(f"{name} is not set: {KEYS[name].help} Set it in the recipe or with --{name}")
    built = tuple(_stage(number, stage, merged) for number, stage in enumerate(merged, 1))
    shared = {name: value for name, value in merged[0].items() if name in RUN_WIDE}
    entries = [
        {**{name: value for name, value in one.items() if name not in shared}, "train": list(stage.train)}
        for one, stage in zip(merged, built, strict=True)
    ]
    resolved = {**{name: run[name] for name in ("model", "output_dir")}, **run, **shared, "stages": entries}
    folder, kwargs = Path(run["output_dir"]), run.get("model_init_kwargs") or {}
    return Recipe(run["model"], folder, kwargs, built, resolved, run.get("architecture"))


@functools.cache
def _config_types() -> dict[str, Any]:
    from ..trainer.cal_config import CALConfig

    types = {
        name: hint for name, hint in typing.get_type_hints(CALConfig).items() if name in CALConfig.__dataclass_fields__
    }
    return {**types, "padding_free": bool | str}  # declared as text, because argparse knows one type a field


def _checked(name: str, value: Any, prefix: str = "") -> Any:
    """The value in the type that the key wants. ValueError for an unknown key or another type."""
    shown = prefix + name
    if name in NOT_HERE:
        raise ValueError(f"{shown} cannot be set here: {NOT_HERE[name]}")
    known = {**_config_types(), **{one: key.type for one, key in KEYS.items()}}
    if name not in known:
        raise unknown(shown, name, set(known) - set(NOT_HERE))
    where = KEYS[name].where if name in KEYS else "both"
    if (where == "top" or name in RUN_WIDE) and prefix:
        raise ValueError(f"{shown}: {name} holds for all stages; set it at the top level")
    if where == "stage" and not prefix:
        raise ValueError(f"{name} belongs into an entry of stages")
    return checked(shown, value, known[name])


def _stage(number: int, stage: dict[str, Any], all_stages: Sequence[Mapping[str, Any]]) -> Stage:
    from ..trainer.sampling import GROUPED

    where = f"stage {number}" if len(all_stages) > 1 else "the recipe"
    train, freeze, lora = _what_trains(where, stage, all_stages)
    data = _sources("data", stage.get("data"))
    if not data:
        raise ValueError(f"{where}: data is not set. {KEYS['data'].help}")
    settings = {name: value for name, value in stage.items() if name not in KEYS}
    check_numbers(where, stage, train)
    if stage.get("streaming") and settings.get("train_sampling_strategy") in GROUPED:
        raise ValueError(f"{where}: train_sampling_strategy: a stream is read in its order. Leave it out, or streaming")
    if stage.get("streaming") and settings.get("max_steps", -1) <= 0:
        raise ValueError(f"{where}: streaming has no known end: set max_steps")
    return Stage(
        number=number,
        name=stage.get("name") or f"stage {number}",
        train=train,
        freeze=freeze,
        lora=lora,
        learning_rates=stage.get("learning_rates") or {},
        data=data,
        eval_data=_sources("eval_data", stage.get("eval_data")),
        chat_template=_template(stage.get("chat_template")),
        settings=settings,
        **{name: stage.get(name, default) for name, default in _DEFAULTS.items()},
    )


def _what_trains(where: str, stage: Mapping[str, Any], all_stages: Sequence[Mapping[str, Any]]) -> tuple[Any, Any, Any]:
    """(train, freeze, lora) of a stage, checked against each other."""
    from ..families.module_groups import FREEZABLE, GROUPS
    from .trainable import check_freeze

    adapters = stage.get("lora") is not None  # {}: with their defaults
    train = stage.get("train", ["projector", "lora" if adapters else "language_model"])
    if not train:
        raise ValueError(
            f"{where}: train={train!r}: nothing would train. Name groups ({', '.join(GROUPS)}), or leave it out"
        )
    train, freeze = _names(train), _names(stage.get("freeze") or ())
    for key, names in (("train", train), ("learning_rates", stage.get("learning_rates") or {})):
        for name in names:
            if name not in GROUPS:
                raise unknown(f"{where}: {key}: {name}", name, GROUPS, "group")
    for name in freeze:
        if name not in FREEZABLE:
            raise unknown(f"{where}: freeze: {name}", name, FREEZABLE, "part")
    lora = _section("lora", stage.get("lora") or {}) if "lora" in train else None
    if adapters and lora is None and not any("lora" in (one.get("train") or ["lora"]) for one in all_stages):
        raise ValueError(f"{where}: lora is set, but train is {', '.join(train)}. Add lora to train, or take lora out")
    # Set at the top level it holds for the stages in which the word table trains
    trains = [_names(other.get("train") or ("projector", "language_model")) for other in all_stages]
    if freeze and "language_model" not in train and any("language_model" in other for other in trains):
        freeze = ()
    check_freeze(train, freeze)
    if stage.get("cache_vision_features") and "vision_tower" in {*train, *(lora.targets if lora else ())}:
        raise ValueError(
            f"{where}: cache_vision_features, but the vision_tower trains, so its features change with every step. Set "
            "cache_vision_features: false, or take vision_tower out"
        )
    return train, freeze, lora


def _names(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _sources(key: str, value: Any) -> tuple[Source, ...]:
    entries = value if isinstance(value, list) else [] if value is None else [value]
    sources = tuple(_section(key, {"path": one} if isinstance(one, str) else one) for one in entries)
    if len({one.weight is None for one in sources}) > 1:
        raise ValueError(f"{key}: give every entry a weight, or none (then every record is used once)")
    return sources


def _section(key: str, value: Any) -> Any:
    """A mapping inside the recipe as its dataclass: Source for data, LoraSettings for lora."""
    from .trainable import LoraSettings

    made_of: Any = LoraSettings if key == "lora" else Source
    hints = typing.get_type_hints(made_of)
    if made_of is LoraSettings:
        hints["target"] = str | list[str]
    if not isinstance(value, dict):
        raise ValueError(f"{key}: expected a path or a mapping with path, got {value!r}")
    for name in value:
        if name not in hints:
            raise unknown(f"{key}.{name}", str(name), hints)
    if made_of is Source and "path" not in value:
        raise ValueError(f"{key}: an entry without path: {value}")
    section = made_of(**{name: checked(f"{key}.{name}", one, hints[name]) for name, one in value.items()})
    return section


def _template(value: str | None) -> str | None:
    from ..data.chat_templates import TEMPLATES, chat_template

    if value is None or "{" in value:
        return value
    if value in TEMPLATES:
        return chat_template(value)
    if not Path(value).is_file():
        raise FileNotFoundError(
            f"chat_template: {value}: no such file, none of ours ({', '.join(TEMPLATES)}), and no Jinja text, which has "
            "{{ or {% in it"
        )
    return Path(value).read_text("utf8")
