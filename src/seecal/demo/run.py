"""``seecal demo``: train a real small vision-language model with CAL on real images, on two CPU cores in minutes.

Stage 1 trains the projector alone, with plain cross-entropy: before the language model can read the image tokens, Δ says
little. Stage 2 trains projector and language model with CAL. What is held out is measured before, between and after.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import verbosity
from . import emoji
from .report import QUESTIONS, SPLITS, report


@dataclass(frozen=True)
class DemoOptions:
    """What ``seecal demo`` can be told. Steps are optimizer steps of ``batch_size`` questions each."""

    out: Path = Path("seecal-demo")
    align_steps: int = 15
    tune_steps: int = 150
    batch_size: int = 16
    held_out: int = 150
    weighting: str = "cal"
    seed: int = 0


TOWER = "seecal_efficientnet_lite"  # in the config.json of every model that the demo made
MIX = {"name": 5, "kind": 2, "describe": 3}  # how often a training batch asks which question
CAPTIONS_OF = (20, 70, 120)  # which unseen drawings are described at the end: fixed, not chosen by how it goes


def run(options: DemoOptions, console: Console) -> int:
    """The whole demo. Returns the exit code: 0, or 130 after Ctrl-C, when everything trained so far has been saved."""
    refuse_foreign_folder(options.out)
    state = Demo(options, console)
    try:
        with state.progress:
            state.prepare()
            state.measure("as shipped")
            state.align()
            state.measure("after stage 1")
            state.tune()
            state.measure("after stage 2")
            state.save()
            captions, tokens = state.captions(), state.token_table()
    except KeyboardInterrupt:
        return state.interrupted()
    report(state, captions, tokens, console)
    return 0


@dataclass
class Demo:
    """The running demo: what there is so far, so that an interruption can save it."""

    options: DemoOptions
    console: Console
    model: Any = None
    processor: Any = None
    images: dict[str, Path] = field(default_factory=dict)
    scores: dict[str, dict[tuple[str, str], Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    stage: str = "preparing"

    def __post_init__(self) -> None:
        columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self.progress = Progress(*columns, *times, console=self.console)
        self.folder = self.options.out / "model"

    # ---- preparing ----

    def prepare(self) -> None:
        """Render the images, build the model, find out how to compute on this machine."""
        bar = self.bar("images and weights", 3)
        items = emoji.catalogue()
        self.images = emoji.render_openmoji(items, self.options.out / "images")
        self.items = [item for item in items if item.hexcode in self.images]
        self.progress.advance(bar)
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # on several GPUs Trainer would split every batch
        import torch

        from ..models import micro
        from . import compute

        verbosity.quiet()
        torch.manual_seed(self.options.seed)
        self.progress.advance(bar)
        with verbosity.no_bars():
            self.model, self.processor = micro.build()
        self.bf16, why = compute.bf16_pays()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.notes.append(why)
        self.progress.advance(bar)

    def bar(self, name: str, total: int) -> TaskID:
        self.stage = name
        return self.progress.add_task(name, total=total, note="")

    # ---- training ----

    def align(self) -> None:
        """Stage 1: the projector alone, every label token alike."""
        self.model.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(True)
        self._train("stage 1: align", self.options.align_steps, "uniform", 5e-4)

    def tune(self) -> None:
        """Stage 2: projector and language model with CAL; the tower and the word table stay."""
        self.model.requires_grad_(True)
        self.model.model.vision_tower.requires_grad_(False)
        # The word table, also the output layer, is a fifth of all parameters and half of the time of a step.
        self.model.get_input_embeddings().requires_grad_(False)
        self._train("stage 2: tune", self.options.tune_steps, self.options.weighting, 3e-4)

    def _train(self, name: str, steps: int, weighting: str, lr: float) -> None:
        if steps == 0:
            return
        from .. import CALConfig, CALTrainer
        from .compute import BarCallback

        bar = self.bar(name, steps)
        # Trainer insists on a folder; it writes nothing there that anyone needs.
        with tempfile.TemporaryDirectory(prefix="trainer-", dir=self.options.out) as scratch:
            config = CALConfig(
                output_dir=scratch,
                weighting=weighting,
                max_steps=steps,
                per_device_train_batch_size=self.options.batch_size,
                learning_rate=lr,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 20),
                train_sampling_strategy="sequential",  # the dataset is in its order already
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                seed=self.options.seed,
                data_seed=self.options.seed,
                bf16=self.bf16,
                use_cpu=self.model.device.type == "cpu",
                gradient_checkpointing=False,
                max_length=None,
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            trainer = CALTrainer(
                self.model,
                config,
                train_dataset=self.dataset(steps, name),
                processing_class=self.processor,
                callbacks=[BarCallback(self.progress, bar)],
            )
            trainer.remove_callback(_printer())
            trainer.train()
        self.model.eval()

    def dataset(self, steps: int, key: str) -> Any:
        """The questions of so many steps about the drawings to train on, in an order that depends on the seed only."""
        from datasets import Dataset, Features, Image, List, Value

        rng = random.Random(f"{self.options.seed}:{key}")
        train, records = emoji.by_split(self.items, emoji.TRAIN), []
        queue: list[emoji.Emoji] = []
        for _ in range(steps):
            # A batch asks one kind of question: one long answer would pad all the short ones.
            question = rng.choices(list(MIX), list(MIX.values()))[0]
            while len(queue) < self.options.batch_size:
                queue += rng.sample(train, len(train))
            batch, queue = queue[: self.options.batch_size], queue[self.options.batch_size :]
            records += [emoji.record(self.images[i.hexcode], emoji.answer(i, question, rng)) for i in batch]
        part = {"type": Value("string"), "text": Value("string")}
        features = {"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())}
        return Dataset.from_list(records, features=Features(features))

    # ---- measuring ----

    def measure(self, when: str) -> None:
        """Held-out drawings and held-out concepts, apart."""
        from . import compute
        from .measure import measure

        bar = self.bar(f"measure {when}", sum(len(self.held_out(split)) for split in SPLITS) * len(QUESTIONS))
        found = {}
        for split in SPLITS:
            for question in QUESTIONS:
                rng = random.Random(0)
                pairs = [(self.images[i.hexcode], emoji.answer(i, question, rng)) for i in self.held_out(split)]
                with compute.precision(self.model.device, self.bf16):
                    step = lambda done: self.progress.advance(bar, done)  # noqa: E731
                    found[split, question] = measure(self.model, self.processor, pairs, on_batch=step)
        self.scores[when] = found

    def held_out(self, split: str) -> list[emoji.Emoji]:
        """The first ``held_out`` of a split in an order that has nothing to do with code points or names."""
        items = sorted(emoji.by_split(self.items, split), key=lambda item: random.Random(item.hexcode).random())
        return items[: self.options.held_out]

    def captions(self) -> list[tuple[str, str]]:
        """(true name, what the model writes) for a few unseen drawings."""
        from ..models.generate import reply

        shown = self.held_out(emoji.HELD_IMAGE)
        found = []
        for index in CAPTIONS_OF:
            item = shown[index % len(shown)]
            text = reply(self.model, self.processor, self.images[item.hexcode], emoji.QUESTIONS["describe"])
            found.append((item.name, text))
        return found

    def token_table(self) -> tuple[str, list[tuple[str, float, float]]]:
        """The true description of one unseen drawing, and (token, Δ, weight) for each of its tokens."""
        from .. import token_weights, visual_delta
        from ..data.collators.vision import VisionCollator
        from ..data.images.decode import open_image

        item = self.held_out(emoji.HELD_IMAGE)[CAPTIONS_OF[0] % len(self.held_out(emoji.HELD_IMAGE))]
        answer = emoji.answer(item, "describe", random.Random(1))
        path = self.images[item.hexcode]
        batch = VisionCollator(self.processor)([{**emoji.record(path, answer), "images": [open_image(path)]}])
        delta = visual_delta(self.model, {name: tensor.to(self.model.device) for name, tensor in batch.items()})
        weights = token_weights(delta.delta, delta.runs)
        tokens = [self.processor.tokenizer.decode([label]) for label in delta.labels.tolist()]
        return item.name, list(zip(tokens, delta.delta.tolist(), weights.tolist(), strict=True))

    # ---- saving ----

    def save(self) -> None:
        """Model and processor into ``out/model``, under another name first: what is there is always whole."""
        part = self.folder.with_name("model.part")
        shutil.rmtree(part, ignore_errors=True)
        self.model.save_pretrained(part)
        self.processor.save_pretrained(part)
        shutil.rmtree(self.folder, ignore_errors=True)
        part.rename(self.folder)

    def interrupted(self) -> int:
        """After Ctrl-C: save what there is, say so in one line."""
        if self.model is None or self.processor is None:
            said = "Stopped while preparing: there was no model to save yet."
        else:
            self.save()
            said = f"Stopped during {self.stage}. Model and processor as trained so far: {self.folder}"
        self.console.print(said, markup=False, highlight=False, soft_wrap=True)
        return 130


def refuse_foreign_folder(out: Path) -> None:
    """ValueError if ``out`` cannot be written to, or holds a ``model`` that no demo made: the demo replaces that folder."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: this is a file. Give a folder with --out.")
    config, folder = out / "model" / "config.json", out / "model"
    ours = config.is_file() and TOWER in config.read_text("utf8", "replace")
    if folder.exists() and not ours:
        raise ValueError(f"{folder}: not made by the demo, which would replace it. Give another folder with --out.")


def _printer() -> type:
    from transformers import PrinterCallback

    return PrinterCallback
