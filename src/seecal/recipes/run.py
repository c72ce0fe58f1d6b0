"""``seecal train``: a recipe's stages one after another, from the command line or under ``accelerate launch``.

    output_dir/recipe.yaml      the resolved recipe, written first
    output_dir/stage-N/         checkpoints, trainer_state.json and metrics.json of stage N
    output_dir/stage-N/model/   what stage N hands to stage N + 1
    output_dir/final/           the last stage's model, processor, chat template, recipe.yaml, metrics.json

A stage always starts from what lies on the disk, so a resumed run and an uninterrupted one do the same.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..models.loading import merge
from ..trainer.checkpoints import newest_checkpoint
from ..verbosity import quiet_training
from .recipe import Recipe, Source, Stage, arguments, read

# What may differ when a run is resumed: it does not change what is learned.
_HARMLESS = {
    *("name", "run_name", "report_to", "log_level", "logging_steps", "logging_strategy", "logging_first_step"),
    *("disable_tqdm", "save_steps", "save_total_limit", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
}


def run(argv: Sequence[str]) -> int:
    """``seecal train`` with these arguments. Returns the exit code: 0; 143 or 130 after SIGTERM or Ctrl-C, with all saved.

    Raises:
        ValueError, FileNotFoundError: something in the recipe, the data or the output folder that the user can mend.
    """
    if "--help" in argv or "-h" in argv or "--help-all" in argv:
        from .help import text

        print(text(everything="--help-all" in argv))
        return 0
    options = {"config": None, "resume": None}
    overrides = []
    for key, values in arguments(argv):
        if key not in options:
            overrides.append((key, values))
        elif len(values) != (key == "config") or (key == "config" and options[key]):
            raise ValueError("--config takes one file" if key == "config" else "--resume takes no value")
        else:
            options[key] = values[0] if values else "yes"  # type: ignore[assignment]
    quiet_training()
    recipe = read(options["config"], overrides)
    try:
        return Run(recipe).go(resume=options["resume"] is not None)
    except FloatingPointError as error:
        print(f"seecal: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        if str(error).startswith("Caught "):  # in a worker of the data loader, with its traceback as text
            raise ValueError(re.sub(r"^[A-Za-z_][\w.]*: ", "", str(error).strip().splitlines()[-1])) from None
        raise


class Run:
    """One run of a recipe in its output folder."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.folder = recipe.output_dir
        self.final = self.folder / "final"
        # In bfloat16 most of AdamW's updates at 2e-5 round to nothing: float32, unless the recipe says otherwise
        self._init_kwargs = {"dtype": "float32", **recipe.model_init_kwargs}
        self._data: dict[Any, Any] = {}

    def go(self, resume: bool) -> int:
        if resume and self.final.exists():
            self._say(f"{self.final} is there already: this run is finished")
            return 0
        self._check_folder(resume)
        # All that can be wrong is looked at before anything trains for hours
        configs = [stage.config(self.folder / f"stage-{stage.number}") for stage in self.recipe.stages]
        for stage in self.recipe.stages:
            self._load_data(stage.data, stage), self._load_data(stage.eval_data, stage)
        for stage, config in zip(self.recipe.stages, configs, strict=True):
            if not self._output_of(stage).exists():
                code = self._stage(stage, config)
                if code:
                    return code
        self._say(f"done: {self.final}")
        return 0

    # ---- One stage ----

    def _stage(self, stage: Stage, config: Any) -> int:
        from transformers import set_seed

        from ..models.loading import load_vlm
        from ..trainer.callbacks import GradientCheck, StopOnSignal
        from .stage_trainer import StageTrainer
        from .trainable import check_groups, prepare, trainable_tree

        source = str(self._source_of(stage))
        model, processor = load_vlm(source, **self._init_kwargs)
        for later in self.recipe.stages[stage.number - 1 :]:
            check_groups(model, later.train)
        set_seed(config.seed)  # adapters start from random numbers
        prepared = prepare(model, stage.train, stage.lora)
        self._say(f"{self._called(stage)}, {', '.join(stage.train)}:")
        self._say(trainable_tree(prepared, config.learning_rate, stage.learning_rates))
        template = processor.chat_template
        if stage.chat_template is not None:
            processor.chat_template = stage.chat_template
        if config.process_index == 0:  # before anything else is in the folder, so that it can be told from others
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "recipe.yaml").write_text(_header() + self.recipe.to_yaml(), "utf8")
        stop = StopOnSignal()
        trainer = StageTrainer(
            prepared.model,
            config,
            train_dataset=with_lengths(self._load_data(stage.data, stage), config),
            eval_dataset=self._load_data(stage.eval_data, stage),
            processing_class=processor,
            callbacks=[stop, *([GradientCheck()] if stage.check_gradients else [])],
            groups=prepared.groups,
            learning_rates=stage.learning_rates,
        )
        checkpoint = newest_checkpoint(Path(config.output_dir), self._say)
        if checkpoint is not None:
            self._say(f"{self._called(stage)}: continues at {checkpoint.name}")
            before = len(list(checkpoint.glob("rng_state*.pth")))
            if before != config.world_size:
                self._say(
                    f"  written by {before} ranks, now {config.world_size}: it goes on, but not with the same batches"
                )
        with stop.listening():
            if checkpoint is None or not trainer.take(checkpoint):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if stop.signal and trainer.state.global_step < trainer.state.max_steps:
            self._say(
                f"Stopped at {self._called(stage)}, step {trainer.state.global_step} of {trainer.state.max_steps}; all is "
                "saved. To continue: the same command with --resume"
            )
            return 128 + stop.signal
        processor.chat_template = template
        self._finish(stage, trainer, source)
        if stop.signal and stage.number < len(self.recipe.stages):
            self._say(f"Stopped after {self._called(stage)}. To continue: the same command with --resume")
            return 128 + stop.signal
        return 0

    def _finish(self, stage: Stage, trainer: Any, source: str) -> None:
        """Measure, and put model, processor, recipe and metrics into their folder, which appears only when it is whole."""
        log = [one for one in trainer.state.log_history if "loss" in one]
        if log and not any(one.get("label_tokens", 1) for one in log):
            raise ValueError(
                f"{self._called(stage)}: no logged step had a label token: with max_length={trainer.args.max_length} and "
                f"on_long={trainer.args.on_long} every record was left out. Raise max_length"
            )
        metrics = {
            "stage": stage.name,
            "steps": trainer.state.global_step,
            "train": log[-1] if log else {},
            "eval": trainer.evaluate() if stage.eval_data else {},
        }
        main, accelerator = trainer.is_world_process_zero(), trainer.accelerator
        folder = self._output_of(stage)
        part = folder.with_name(folder.name + ".part")
        if main:
            shutil.rmtree(part, ignore_errors=True)
        accelerator.wait_for_everyone()
        adapted = "lora" in stage.train
        trainer.save_model(str(part / "adapter" if adapted else part))  # gathers shards: all ranks take part
        trainer.save_state()
        accelerator.wait_for_everyone()
        if main:
            if adapted:
                merged = merge(source, part / "adapter", **self._init_kwargs)
                merged.save_pretrained(part)
                trainer.processing_class.save_pretrained(part)
            for pickled in part.rglob("training_args.bin"):
                pickled.unlink()
            _write_json(self.folder / f"stage-{stage.number}" / "metrics.json", metrics)
            if folder == self.final:
                shutil.copy(self.folder / "recipe.yaml", part)
                every = [self.folder / f"stage-{one.number}" / "metrics.json" for one in self.recipe.stages]
                _write_json(part / "metrics.json", {"stages": [json.loads(one.read_text("utf8")) for one in every]})
            part.rename(folder)
        accelerator.wait_for_everyone()
        accelerator.free_memory()

    # ---- Folders and data ----

    def _output_of(self, stage: Stage) -> Path:
        last = stage.number == len(self.recipe.stages)
        return self.final if last else self.folder / f"stage-{stage.number}" / "model"

    def _source_of(self, stage: Stage) -> Path | str:
        return self.recipe.model if stage.number == 1 else self._output_of(self.recipe.stages[stage.number - 2])

    def _called(self, stage: Stage) -> str:
        number = f"stage {stage.number}"
        total = f"{number} of {len(self.recipe.stages)}"
        return total if stage.name == number else f"{total} ({stage.name})"

    def _check_folder(self, resume: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output_dir: {self.folder}: this is a file. Give a folder.")
        before = self.folder / "recipe.yaml"
        if not before.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(
                    f"output_dir: {self.folder} holds other files. Give an empty folder, or one that is not there"
                )
            return
        kept = ("stage-*/checkpoint-*", "stage-*/model", "final")
        if not any(any(self.folder.glob(one)) for one in kept):
            return  # it stopped before it had anything to keep
        if not resume:
            state = "a finished run" if self.final.exists() else "an unfinished run"
            remedy = (
                "Give another folder" if self.final.exists() else "Continue it with --resume, or give another folder"
            )
            raise ValueError(f"output_dir: {self.folder} holds {state}. {remedy}")
        try:
            started = yaml.safe_load(before.read_text("utf8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            started = None
        if not isinstance(started, dict) or "stages" not in started:
            raise ValueError(
                f"--resume: {before} is damaged, so what the run was started with is not known. Put it back"
            )
        changed = _differences(started, self.recipe.resolved)
        if changed:
            raise ValueError(
                f"--resume: the run in {self.folder} was started with another recipe: {'; '.join(changed)}. Go on with the "
                "same settings, or give another output_dir"
            )

    def _load_data(self, sources: tuple[Source, ...], stage: Stage) -> Any:
        if not sources:
            return None
        seed = stage.settings.get("seed", 42)
        key = (sources, stage.streaming, stage.on_bad, seed)
        if key not in self._data:
            self._data[key] = load_data(sources, streaming=stage.streaming, on_bad=stage.on_bad, seed=seed)
        return self._data[key]

    @staticmethod
    def _say(text: str) -> None:
        from accelerate import PartialState

        if PartialState().is_main_process:
            print(text, flush=True)


def load_data(sources: Sequence[Source], *, streaming: bool, on_bad: str, seed: int) -> Any:
    """One data set, or the mixture of several: by their weights, or without weights every record once."""
    from ..data.sources.load import load_records
    from ..data.sources.mixture import mix

    loaded = {}
    for number, one in enumerate(sources):
        name = one.path if one.path not in loaded else f"{one.path} ({number})"
        loaded[name] = load_records(
            one.path, format=one.format, image_root=one.image_root, streaming=streaming, on_bad=on_bad
        )
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    if sources[0].weight is None:
        return mix(loaded, seed=seed, stopping="all_exhausted_without_replacement")
    return mix(loaded, [one.weight for one in sources if one.weight is not None], seed=seed)


def with_lengths(data: Any, config: Any) -> Any:
    """The data with the column that grouping by length sorts by, if that is asked for.

    An estimate in tokens, to sort by and not to cut by: four characters a token, 576 tokens an image. So batches are also
    grouped into those with images and those without, as the paper's are.
    """
    column = config.length_column_name
    grouped = config.train_sampling_strategy in ("group_by_length", "batch_rebalance")
    if not grouped or not hasattr(data, "__len__") or column in data.column_names:
        return data
    lengths = [
        sum(
            576 if part["type"] == "image" else len(part["text"] or "") // 4
            for turn in turns
            for part in turn["content"]
        )
        for turns in data["messages"]
    ]
    return data.add_column(column, lengths)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """'key was X, is Y' for all that matters."""
    found = []
    pairs = [({k: v for k, v in r.items() if k not in ("stages", "output_dir")}, r["stages"]) for r in (before, now)]
    if len(pairs[0][1]) != len(pairs[1][1]):
        return [f"it had {len(pairs[0][1])} stages, now {len(pairs[1][1])}"]
    for number, (old, new) in enumerate(zip(*[[top, *stages] for top, stages in pairs], strict=True)):
        for name in sorted({*old, *new} - _HARMLESS):
            if old.get(name) != new.get(name):
                where = f"stages.{number}." if number and len(pairs[0][1]) > 1 else ""
                found.append(f"{where}{name} was {old.get(name)}, is {new.get(name)}")
    return found


def _header() -> str:
    import transformers
    import trl

    from .. import __version__

    return f"# seecal {__version__}, transformers {transformers.__version__}, trl {trl.__version__}\n"


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf8")
