"""A recipe made small: its model with few layers and random weights, few records, two steps a stage, on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.collators.processors import has_prefix
from .layers import SHIPPED
from .recipe import RUN_WIDE, Recipe, Source, Stage, read
from .synthetic_data import write_synthetic
from .yaml_text import read_yaml

TINY = "out/tiny/model"  # of the recipe tiny
RECORDS, EVAL_RECORDS, STEPS, BATCH = 32, 8, 2, 2
# What of the settings belongs to the device, to the scores of the real data, or to what is said of a run
_LEFT_OUT = (
    *(*RUN_WIDE, "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("use_liger_kernel", "weights", "run_name"),
)
_HERE = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "max_steps": STEPS,
    "logging_steps": 1,
    "logging_strategy": "steps",
    "save_strategy": "steps",
    "save_steps": STEPS,
    "per_device_eval_batch_size": BATCH,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
    "push_to_hub": False,
}
_OPTIMIZERS = ("adamw_torch", "sgd", "adafactor", "adagrad", "rmsprop")  # those that need no GPU and no other package


@dataclass(frozen=True)
class Original:
    """The model that a recipe names.

    Attributes:
        config: in its real size.
        processor: its own; None: its folder is not there.
        source: what both were taken from.
    """

    config: Any
    processor: Any
    source: str


def model_of(recipe: Recipe) -> Original:
    """Config and processor of the recipe's model: from its folder, the hub's files on this disk, or by ``architecture``.

    What of ``model_init_kwargs`` changes the config is in it.

    Raises:
        ValueError: a folder that holds no model, a model about which nothing is known here, settings that its config does
            not take.
    """
    found = _found(recipe)
    known = set(found.config.to_dict()) - {"dtype", "quantization_config"}
    changed = {name: value for name, value in recipe.model_init_kwargs.items() if name in known}
    if not changed:
        return found
    try:
        return dataclasses.replace(found, config=type(found.config).from_dict({**found.config.to_dict(), **changed}))
    except (ValueError, TypeError) as error:
        raise ValueError(f"model_init_kwargs: {', '.join(changed)}: {error}") from None


def _found(recipe: Recipe) -> Original:
    from ..models.known import known_config
    from ..models.loading import is_adapter, load_processor, source_of
    from ..models.trusted_files import check_config, check_weights

    folder = Path(recipe.model)
    if folder.is_dir():
        processor = load_processor(recipe.model)
        options = recipe.model_init_kwargs
        if is_adapter(folder):
            return Original(known_config(source_of(folder)), processor, recipe.model)
        config = known_config(recipe.model)
        check_config(config, recipe.model, options)
        check_weights(folder, options)
        return Original(config, processor, recipe.model)
    if (cached := _from_the_cache(recipe.model)) is not None:
        return cached
    name = recipe.architecture or recipe.model
    if name == TINY:
        from .tiny import tiny_llava, tiny_llava_processor

        return Original(tiny_llava().config, tiny_llava_processor(), "what seecal tiny-folder writes")
    try:
        return Original(known_config(name), None, f"the known sizes of {name}")
    except ValueError as error:
        if recipe.architecture:
            raise ValueError(f"architecture: {error}") from None
        raise ValueError(
            f"model: {recipe.model}: no such folder, and nothing is known of a model of that name. Correct the path, "
            "or set architecture to a model that is known (seecal train --help)"
        ) from None


def _from_the_cache(name: str) -> Original | None:
    """Of a hub id whose files lie in the hub's cache; nothing is downloaded."""
    if name.count("/") != 1 or name.startswith((".", "/")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from transformers import AutoConfig, AutoProcessor

    # By its folder: of an id that is not there huggingface_hub asks its server, whatever local_files_only says
    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return None
    folder, local = Path(config).parent, {"local_files_only": True, "trust_remote_code": False}
    try:
        return Original(
            AutoConfig.from_pretrained(folder, **local),
            AutoProcessor.from_pretrained(folder, **local),
            f"{name} (on this disk)",
        )
    except (OSError, ValueError):
        return None


def placeholders(config: str | Path | None) -> set[str]:
    """Paths that a shipped recipe names for its user to put something there; empty for a recipe of the user's own."""
    found: set[str] = set()
    name = None if config is None else str(config)
    while name is not None:
        path = Path(name) if Path(name).is_file() else SHIPPED / f"{name}.yaml"
        if path.resolve().parent == SHIPPED.resolve():
            recipe = read(str(path))
            sources = [source for stage in recipe.stages for source in (*stage.data, *stage.eval_data)]
            found |= {recipe.model, *(path for source in sources for path in paths_of(source))}
        own = read_yaml(path)
        name = own.get("extends") if isinstance(own, dict) else None
    return found


def paths_of(source: Source) -> list[str]:
    """Its data, then the folders of its images."""
    roots = source.image_root
    return [source.path, *([roots] if isinstance(roots, str) else roots or [])]


def missing_weights(recipe: Recipe) -> str | None:
    """The file of weights that the model's folder lacks; None: nothing, or there is no folder."""
    folder = Path(recipe.model)
    adapter = (folder / "adapter_config.json").is_file()
    if not folder.is_dir() or adapter or recipe.model_init_kwargs.get("use_safetensors") is False:
        return None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf8")).get("weight_map", {}).values()))
        return next((name for name in names if not (folder / name).is_file()), None)
    return None if any(folder.glob("*.safetensors")) else "model.safetensors"


def packages(recipe: Recipe) -> list[str]:
    """What has to be installed for the recipe and is not, here at least."""
    optimizers = {str(stage.settings.get("optim", "")) for stage in recipe.stages}
    wanted = any("8bit" in one or "bnb" in one for one in optimizers - {"adamw_torch_8bit"})
    wanted = wanted or "quantization_config" in recipe.model_init_kwargs
    there = importlib.util.find_spec("bitsandbytes") is not None
    return ["bitsandbytes (pip install 'seecal[qlora]')"] if wanted and not there else []


class SmallRecipe:
    """Rewrites a recipe into one that runs in seconds; notes what it replaced.

    Args:
        recipe: the real one.
        folder: an empty one, for data and output.
        processor: that the small model has.

    Attributes:
        replaced: (what, in the recipe, here).
        missing: (key, path) of data that is not there.
        names: path here → what the recipe calls it, for messages.
    """

    def __init__(self, recipe: Recipe, folder: Path, processor: Any) -> None:
        self.recipe, self.folder, self.processor = recipe, folder, processor
        self.replaced: list[tuple[str, str, str]] = []
        self.missing: list[tuple[str, str]] = []
        self.names: dict[str, str] = {}
        self._written: dict[str, Source] = {}

    def made(self) -> Recipe:
        """The small recipe; made-up data is written."""
        stages = tuple(self._stage(stage) for stage in self.recipe.stages)
        return dataclasses.replace(
            self.recipe,
            model=str(self.folder / "model"),
            output_dir=self.folder / "run",
            model_init_kwargs=self._init_kwargs(),
            stages=stages,
        )

    def _note(self, what: str, real: object, here: object) -> None:
        entry = (what, str(real), str(here))
        if entry not in self.replaced:
            self.replaced.append(entry)

    def _stage(self, stage: Stage) -> Stage:
        one_turn = has_prefix(self.processor) and not (stage.chat_template or self.processor.chat_template)
        return dataclasses.replace(
            stage,
            data=self._sources(stage.data, RECORDS, one_turn),
            eval_data=self._sources(stage.eval_data, EVAL_RECORDS, one_turn),
            settings=self._settings(stage),
        )

    def _settings(self, stage: Stage) -> dict[str, Any]:
        old = stage.settings
        where = f"stage {stage.number}: " if len(self.recipe.stages) > 1 else ""
        new = {name: value for name, value in old.items() if name not in _LEFT_OUT} | _HERE
        for name, most in (("per_device_train_batch_size", BATCH), ("gradient_accumulation_steps", 2)):
            value = old.get(name, 8 if name.startswith("per") else 1)
            new[name] = min(value, most)
            if value > most:
                self._note(where + name, value, most)
        steps = old.get("max_steps", -1)
        epochs = old.get("num_train_epochs", 3)
        real = f"{steps} steps" if steps > 0 else f"{epochs:g} epoch{'s' * (epochs != 1)}"
        self._note(where + "length", real, f"{STEPS} steps")
        if str(old.get("eval_strategy", "no")) == "steps":
            new["eval_steps"] = 1
        optimizer = str(old.get("optim", "adamw_torch"))
        if optimizer not in _OPTIMIZERS:
            new["optim"] = "adamw_torch"
            self._note("optim", optimizer, "adamw_torch")
        for name in ("fp16", "deepspeed", "fsdp", "torch_compile", "use_liger_kernel", "weights"):
            if old.get(name):
                self._note(name, old[name], "left out")
        if old.get("bf16", True) and not old.get("use_cpu"):
            self._note("precision", "bfloat16 (bf16) on a GPU", "float32 on the CPU")
        return new

    def _init_kwargs(self) -> dict[str, Any]:
        kwargs = dict(self.recipe.model_init_kwargs)
        for name in ("dtype", "torch_dtype", "device_map", "attn_implementation"):
            if name in kwargs:
                here = {"device_map": "the CPU", "attn_implementation": "sdpa"}.get(name, "float32")
                self._note(f"model_init_kwargs.{name}", kwargs.pop(name), here)
        if "quantization_config" in kwargs and importlib.util.find_spec("bitsandbytes") is None:
            self._note("model_init_kwargs.quantization_config", kwargs.pop("quantization_config"), "left out")
        return kwargs

    # ---- Data ----

    def _sources(self, sources: Sequence[Source], count: int, one_turn: bool) -> tuple[Source, ...]:
        return tuple(self._source(source, count, one_turn) for source in sources)

    def _source(self, source: Source, count: int, one_turn: bool) -> Source:
        missing = [path for path in paths_of(source) if not Path(path).exists()]
        named = [("data" if path == source.path else "image_root", path) for path in missing]
        self.missing += [one for one in named if one not in self.missing]
        if not missing:
            self._note(source.path, "all records", f"the first {count}")
            return source
        key = repr((source, source.image_root, source.columns, count, one_turn))
        if key not in self._written:
            place = self.folder / f"data-{len(self._written) + 1}"
            made = write_synthetic(source, place, count, one_turn=one_turn)
            self._written[key] = made
            self.names[made.path] = source.path
            self._note(source.path, "all records", f"{count} made-up ones in its format")
        return self._written[key]


def texts_of(recipe: Recipe) -> list[str]:
    """Texts of the first records of the recipe's data, of what is there of it. What cannot be read is told elsewhere."""
    from ..data.sources.load import LocatedRecords

    texts: list[str] = []
    for source in {repr(one): one for stage in recipe.stages for one in stage.data}.values():
        if all(Path(path).exists() for path in paths_of(source)):
            with contextlib.suppress(ValueError, OSError):
                rows = itertools.islice(LocatedRecords(source.path, **source.options(), keep_lost=True).rows(), RECORDS)
                turns = [turn for row in rows if row.record is not None for turn in row.record["messages"]]
                texts += [part["text"] for turn in turns for part in turn["content"] if part.get("text")]
    return texts
