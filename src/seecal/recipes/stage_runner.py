"""One stage of a recipe, in the order of its methods: load, prepare, make the trainer, resume, train, measure, finish.

A stage always starts from what lies on the disk, so a resumed run and an uninterrupted one do the same.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from ..data.collators.processors import configure
from ..data.options import mapping_of
from ..models.feature_cache import VisionFeatureCache
from ..models.loading import load_vlm, merge
from ..models.quantised import four_bit_config
from ..trainer.callbacks import GradientCheck, ProgressCallback, StopOnSignal
from ..verbosity import Progress
from .folder import RunFolder
from .recipe import Stage
from .stage_trainer import StageTrainer
from .trainable import Prepared, check_groups, prepare, trainable_tree


@dataclass(frozen=True)
class Speech:
    """How a run talks: lines, progress, and whether each log of Trainer's is a line."""

    say: Callable[[str], None]
    progress: Progress
    logs: bool = True


class StageRunner:
    """Trains one stage from what lies on the disk, and leaves its result there.

    Args:
        folder: of the run.
        stage: which of its recipe's stages.
        config: the stage's CALConfig.
        speech: how it talks.
    """

    def __init__(self, folder: RunFolder, stage: Stage, config: Any, speech: Speech) -> None:
        self.folder, self.stage, self.config, self.speech = folder, stage, config, speech
        self.recipe = folder.recipe
        self.source = str(folder.source_of(stage))
        # In bfloat16 most of AdamW's updates at 2e-5 round to nothing: float32, unless the recipe says otherwise
        self._init_kwargs = {"dtype": "float32", **self.recipe.model_init_kwargs}
        self._stop = StopOnSignal()

    def run(self, data: Any, eval_data: Any) -> int:
        """Train on ``data``. Returns 0, or 143 or 130 after SIGTERM or Ctrl-C, with all saved."""
        model, processor = self.load()
        prepared = self.prepare(model)
        template = processor.chat_template
        if self.stage.chat_template is not None:
            processor.chat_template = self.stage.chat_template
        if self.config.process_index == 0:
            self.folder.write_recipe()
        trainer = self.make_trainer(prepared, processor, data, eval_data)
        with self.cached_features(model):
            self.train(trainer, self.resume_from(trainer))
        if self._stop.signal and trainer.state.global_step < trainer.state.max_steps:
            where = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
            self.speech.say(
                f"Stopped at {self.called}, {where}; all is saved. To continue: the same command with --resume"
            )
            return 128 + self._stop.signal
        metrics = self.measure(trainer)  # by the stage's own template, as every evaluation before
        processor.chat_template = template
        self.finish(trainer, metrics)
        if self._stop.signal and self.stage.number < len(self.recipe.stages):
            self.speech.say(f"Stopped after {self.called}. To continue: the same command with --resume")
            return 128 + self._stop.signal
        return 0

    @property
    def called(self) -> str:
        """ "stage 2 of 2 (tune)"."""
        number = f"stage {self.stage.number}"
        total = f"{number} of {len(self.recipe.stages)}"
        return total if self.stage.name == number else f"{total} ({self.stage.name})"

    # ---- Before training ----

    def load(self) -> tuple[Any, Any]:
        """(model, processor) to start from. ValueError where this stage or a later one names what the model has not."""
        self._settle_quantisation()
        with self.speech.progress.task(f"loading {self.source}"):
            model, processor = load_vlm(self.source, **self._init_kwargs)
        for later in self.recipe.stages[self.stage.number - 1 :]:
            check_groups(model, later.train, later.freeze)
            given = later.settings.get("processor_kwargs")
            given = mapping_of("processor_kwargs", given) if isinstance(given, str) else given
            configure(copy.deepcopy(processor), given)
        if any(later.cache_vision_features for later in self.recipe.stages[self.stage.number :]):
            VisionFeatureCache(model.requires_grad_(False))  # its error says why this tower cannot be kept
        return model, processor

    def _settle_quantisation(self) -> None:
        """Where ``quantization_config`` is asked for: in 4 bits on the stage's device if it trains adapters, else not."""
        given = self._init_kwargs.pop("quantization_config", None)
        if given is None:
            return
        if not any("lora" in stage.train for stage in self.recipe.stages):
            raise ValueError(
                "model_init_kwargs.quantization_config: weights in 4 bits do not train, adapters on them do. Set lora "
                "(train: [projector, lora]), or take quantization_config out"
            )
        wanted = four_bit_config(self.source, given, self.config.bf16)
        if "lora" not in self.stage.train:
            self.speech.say(f"{self.called}: no lora trains here, so the model is loaded without quantization_config")
            return
        self._init_kwargs["quantization_config"] = wanted
        self._init_kwargs.setdefault("device_map", {"": self.config.device})

    def prepare(self, model: Any) -> Prepared:
        """Freeze all that does not train, put adapters on, and say so."""
        set_seed(self.config.seed)  # adapters start from random numbers
        prepared = prepare(model, self.stage.train, self.stage.lora, self.stage.freeze)
        self.speech.say(f"{self.called}, {', '.join(self.stage.train)}:")
        self.speech.say(trainable_tree(prepared, self.config.learning_rate, self.stage.learning_rates))
        return prepared

    def make_trainer(self, prepared: Prepared, processor: Any, data: Any, eval_data: Any) -> StageTrainer:
        trainer = StageTrainer(
            prepared.model,
            self.config,
            train_dataset=with_lengths(data, self.config),
            eval_dataset=eval_data,
            processing_class=processor,
            callbacks=[self._stop, *([GradientCheck()] if self.stage.check_gradients else [])],
            groups=prepared.groups,
            learning_rates=self.stage.learning_rates,
        )
        trainer.quarantine = self.folder.quarantine(self.stage)
        ProgressCallback(self.speech.progress, self.called, self.speech.logs).replace_bars_of(trainer)
        return trainer

    @contextlib.contextmanager
    def cached_features(self, model: Any) -> Any:
        """Inside the block the frozen tower runs once an image, where the recipe asks for that."""
        if not self.stage.cache_vision_features:
            yield
            return
        cache = VisionFeatureCache(model)
        with cache.on():
            yield
        if cache.full:
            self.speech.say(
                f"{self.called}: cache_vision_features kept {cache.gib:.1f} GiB, all it may; {cache.misses} images went "
                f"through the vision tower, {cache.hits} did not have to"
            )

    def resume_from(self, trainer: StageTrainer) -> Path | None:
        """The newest whole checkpoint of this stage. ValueError where it was written with other data or batches."""
        checkpoint = trainer.newest_whole(self.config.output_dir, self.speech.say)
        if checkpoint is not None:
            trainer.check_goes_on(checkpoint)
            self.speech.say(f"{self.called}: continues at {checkpoint.name}")
        return checkpoint

    # ---- Training, and after it ----

    def train(self, trainer: StageTrainer, checkpoint: Path | None) -> None:
        with self._stop.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def measure(self, trainer: Any) -> dict[str, Any]:
        """The stage's figures: its last log, and an evaluation where there is data. ValueError if nothing was learnt."""
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        if log and not any(entry.get("label_tokens", 1) for entry in log):
            raise ValueError(
                f"{self.called}: no logged step had a label token: with max_length={trainer.args.max_length} and "
                f"on_long={trainer.args.on_long} every record was left out. Raise max_length"
            )
        return {
            "stage": self.stage.name,
            "steps": trainer.state.global_step,
            "train": log[-1] if log else {},
            "eval": trainer.evaluate() if self.stage.eval_data else {},
        }

    def finish(self, trainer: Any, metrics: dict[str, Any]) -> None:
        """Put model, processor, recipe and metrics into their folder, which appears only when it is whole."""
        main, accelerator = trainer.is_world_process_zero(), trainer.accelerator
        output = self.folder.output_of(self.stage)
        part = output.with_name(output.name + ".part")
        if main:
            shutil.rmtree(part, ignore_errors=True)
        accelerator.wait_for_everyone()
        adapted = "lora" in self.stage.train
        trainer.save_model(str(part / "adapter" if adapted else part))  # gathers shards: all ranks take part
        trainer.save_state()
        accelerator.wait_for_everyone()
        if main:
            if adapted:
                merge(self.source, part / "adapter", **self._init_kwargs).save_pretrained(part)
                trainer.processing_class.save_pretrained(part)
            _write_json(self.folder.of_stage(self.stage) / "metrics.json", metrics)
            if output == self.folder.final:
                shutil.copy(self.folder.path / "recipe.yaml", part)
                files = [self.folder.of_stage(stage) / "metrics.json" for stage in self.recipe.stages]
                _write_json(part / "metrics.json", {"stages": [json.loads(file.read_text("utf8")) for file in files]})
            part.rename(output)
        accelerator.wait_for_everyone()
        accelerator.free_memory()


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


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf8")
