"""``seecal demo``: a real small vision-language model trained with CAL on real images, on two CPU cores in minutes.

It does what a user would, and leaves it all in its folder: images and records, a recipe of two stages, and then that
recipe through ``seecal train``'s own path. Stage 1 trains the projector alone, with plain cross-entropy: before the
language model can read the image tokens, Δ says little. Stage 2 trains projector and language model with CAL. What is held
out is measured as shipped and after each stage.

    out/images/ data.json eval.json     what it trains on, what it measures on
    out/start/                          the model as shipped
    out/recipe.yaml                     seecal train --config out/recipe.yaml
    out/run/                            as every recipe's output_dir: run/stage-1/model, run/final
    out/held_out.json scores/ report.html   what the image does to each token of held-out descriptions, to look at
    out/demo.json                       how far it is

Run again in the same folder it goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .. import verbosity
from . import emoji, files
from .plan import MOST_HELD_OUT, Plan, budget, of_steps, plan
from .report import CAPTIONS_OF, Results, report
from .state import DemoOptions, State, open_state

if TYPE_CHECKING:
    from ..recipes.folder import RunFolder

__all__ = ["DemoOptions", "run"]

_TRIED = 32  # held-out questions that are timed


def run(options: DemoOptions, console: Console) -> int:
    """The whole demo. Returns the exit code: 0, or 130 (143) after Ctrl-C (SIGTERM), when all there is has been saved."""
    return carry_out(Demo(options, open_state(options), console))


def carry_out(demo: Demo) -> int:
    """A demo from where it is to its end, or to where it is stopped; what :func:`run` returns."""
    code = 130
    try:
        with demo.progress:
            results = demo.go()
        if not isinstance(results, int):
            demo.show(results)
            return 0
        code = results
    except KeyboardInterrupt:
        pass
    finally:
        demo.note_time()
    demo.console.print(demo.how_to_go_on(), markup=False, highlight=False, soft_wrap=True)
    return code


class Demo:
    """The running demo."""

    trainings = 0  # of stage 2, where they are compared

    def __init__(self, options: DemoOptions, state: State, console: Console) -> None:
        self.options, self.state, self.console, self.out = options, state, console, options.out
        self.progress = verbosity.Progress(console)
        self.doing = "preparing"
        self._started = time.monotonic()
        self._features: Any = None  # of the tower, which is the same in all models

    def go(self) -> Any:
        """The results, or an exit code other than 0."""
        self.prepare_images()
        self.prepare_machine()
        planned = (self.out / "recipe.yaml").exists()
        if not planned or "as shipped" not in self.state.scores:
            model, processor = self.start_model()
            if not planned:
                self.write_files(self.make_plan(model, processor))
            self.measure("as shipped", model, processor)
            del model
        folder = self.recipe_folder()
        code = self.train(folder)
        if code:
            return code
        for stage in folder.recipe.stages:
            self.doing = f"measuring after stage {stage.number}"
            if f"after stage {stage.number}" not in self.state.scores:
                self.measure(f"after stage {stage.number}", *self.load(folder.output_of(stage)))
        self.doing = "drawing the page"
        stages = [folder.output_of(stage) for stage in folder.recipe.stages]
        names = ("before", "after")[-len(stages) :]  # a recipe that was changed may have one stage alone
        return self.results(folder, self.draw_page(dict(zip(names, stages[-2:], strict=True))))

    def show(self, results: Any) -> None:
        """Print what :meth:`go` has found."""
        report(results, self.console)

    # ---- Preparing ----

    def prepare_images(self) -> None:
        with self.progress.task("images"):
            items = emoji.catalogue()
            self.images = emoji.render_openmoji(items, self.out / "images")
        self.items = [item for item in items if item.hexcode in self.images]

    def prepare_machine(self) -> None:
        """Quiet libraries, one GPU at most, and the faster precision."""
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # on several GPUs Trainer would split every batch
        from .compute import bf16_pays

        verbosity.quiet()
        if self.state.bf16 is None:
            self.state.bf16, self.state.machine = bf16_pays()
            self.state.save()

    def start_model(self) -> tuple[Any, Any]:
        """The model as shipped, on the device that it trains on; it lies in ``out/start`` from the first run on."""
        import torch

        from ..models import micro

        start = self.out / "start"
        if start.exists():
            model, processor = self.load(start)
        else:
            torch.manual_seed(self.options.seed)
            with self.progress.task("weights"), verbosity.no_bars():
                model, processor = micro.build()
            files.write_model(start, model, processor)
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor

    def load(self, folder: Path) -> tuple[Any, Any]:
        """(model, processor) of a folder of the demo, on the device."""
        from ..models.generate import load

        gc.collect()  # a trainer and its model hold each other
        with self.progress.task(f"loading {folder}"):
            return load(str(folder))

    def make_plan(self, model: Any, processor: Any) -> Plan:
        """How many steps and held-out drawings, said in one line."""
        options = self.options
        if options.steps is not None:
            found = of_steps(options.steps, options.held_out)
        else:
            from . import trial

            preparing = time.monotonic() - self._started
            with self.progress.task("timing a few steps"):
                begin, bf16 = time.monotonic(), bool(self.state.bf16)
                step = trial.seconds_a_step(model, processor, self._trial_batches(), options.weighting, bf16)
                shown = files.held_out(self.items, emoji.HELD_IMAGE, _TRIED)
                asked = [(self.images[item.hexcode], emoji.answer(item, "name", random.Random(0))) for item in shown]
                question = trial.seconds_a_question(model, processor, asked, bf16)
            seconds = budget(options.minutes, preparing, time.monotonic() - begin)
            found = plan(seconds, step, question, options.held_out, self.trainings)
        self.console.print(f"{found.why}.", markup=False, highlight=False, soft_wrap=True)
        return found

    def _trial_batches(self) -> list[tuple[float, list[tuple[Path, emoji.Answer]]]]:
        """One batch of each kind of question, and how often that comes."""
        shown = emoji.by_split(self.items, emoji.TRAIN)[: self.options.batch_size]
        rng = random.Random(0)
        return [
            (share, [(self.images[item.hexcode], emoji.answer(item, question, rng)) for item in shown])
            for question, share in files.MIX.items()
        ]

    def write_files(self, found: Plan) -> None:
        """data.json, eval.json, and last recipe.yaml: where that is, the others are whole."""
        options, steps = self.options, max(found.align_steps, found.tune_steps)
        asked = files.questions(self.items, steps, options.batch_size, options.seed)
        files.write_data(self.out / "data.json", asked, self.images)
        shown = {split: files.held_out(self.items, split, found.held_out) for split in files.HELD_OUT}
        files.write_eval(self.out / "eval.json", shown, self.images)
        self.write_recipe(found, files.Part(), options.weighting, options.seed)

    def write_recipe(self, found: Plan, part: files.Part, weighting: str, seed: int) -> None:
        """A recipe into its file, which is whole or not there."""
        import torch

        text = files.recipe(
            self.out,
            found,
            batch_size=self.options.batch_size,
            weighting=weighting,
            seed=seed,
            on_cpu=not torch.cuda.is_available(),
            bf16=bool(self.state.bf16),
            part=part,
        )
        aside = self.out / "recipe.part"
        aside.write_text(text, "utf8")
        aside.replace(self.out / part.file)

    # ---- Training ----

    def recipe_folder(self, file: str = "recipe.yaml") -> RunFolder:
        """Where the recipe puts what, as it stands in its file now."""
        from ..recipes.folder import RunFolder
        from ..recipes.recipe import read

        return RunFolder(read(str(self.out / file)))

    def train(self, folder: RunFolder) -> int:
        """The recipe through the path of ``seecal train --resume``; its exit code."""
        from ..recipes.run import Run

        self.doing = "training"
        return Run(folder.recipe, self.progress, quiet=True).go(resume=True)

    # ---- Measuring ----

    def measure(self, when: str, model: Any, processor: Any) -> None:
        """Held-out drawings and held-out concepts, apart, into the state."""
        from .measure import measure

        asked = files.read_eval(self.out / "eval.json")
        found = {}
        with (
            self.progress.task(f"measure {when}", sum(map(len, asked.values())), unit="question") as task,
            self.measuring(model),
        ):
            for key, pairs in asked.items():
                found[key] = measure(model, processor, pairs, on_batch=task.advance)
        self.state.scores[when] = found
        self.state.save()

    @contextlib.contextmanager
    def measuring(self, model: Any) -> Iterator[None]:
        """The precision that is faster here; the tower, the same in all models, runs once an image."""
        from ..models.feature_cache import VisionFeatureCache
        from .compute import precision

        if self._features is None:
            self._features = VisionFeatureCache(model.requires_grad_(False))
        with precision(model.device, bool(self.state.bf16)), self._features.on(model.requires_grad_(False)):
            yield

    def draw_page(self, models: Mapping[str, Path]) -> Path:
        """Scores of held-out descriptions by each model (name -> folder), the first two as a page; drawn anew each time,
        which takes seconds."""
        import torch

        from .compute import precision
        from .page import held_out_page, write_described

        write_described(self.out / "held_out.json", self.items, self.images)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with self.progress.task("scores of what is held out"):
            return held_out_page(
                self.out, models, lambda: precision(device, bool(self.state.bf16)), Console(quiet=True)
            )

    def results(self, folder: RunFolder, page: Path) -> Results:
        """What the report shows: scores, some captions, the tokens of one description."""
        from ..models.generate import reply

        model, processor = self.load(folder.final)
        shown = files.held_out(self.items, emoji.HELD_IMAGE, MOST_HELD_OUT)
        captions = []
        with self.progress.task("captions", len(CAPTIONS_OF)) as task:
            for index in CAPTIONS_OF:
                item = shown[index % len(shown)]
                text = reply(model, processor, self.images[item.hexcode], emoji.QUESTIONS["describe"])
                captions.append((item.name, text))
                task.advance()
        described = shown[CAPTIONS_OF[0] % len(shown)]
        return Results(
            options=self.options,
            state=self.state,
            seconds=self.state.seconds + time.monotonic() - self._started,
            asked=files.read_eval(self.out / "eval.json"),
            items=self.items,
            final=folder.final,
            page=page,
            steps=sum(stage.settings.get("max_steps", 0) for stage in folder.recipe.stages),
            image=self.images[shown[0].hexcode],
            captions=captions,
            described=described.name,
            tokens=self.tokens_of(model, processor, described),
        )

    def tokens_of(self, model: Any, processor: Any, item: emoji.Emoji) -> list[tuple[str, float, float]]:
        """(token, Δ, weight) for each token of the drawing's true description."""
        from ..core.enable import visual_delta
        from ..core.weighting import token_weights
        from ..data.collators.vision import VisionCollator
        from ..data.images.decode import open_image

        answer, path = emoji.described(item), self.images[item.hexcode]
        batch = VisionCollator(processor)([{**emoji.record(path, answer), "images": [open_image(path)]}])
        delta = visual_delta(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        weights = token_weights(delta.delta, delta.runs)
        tokens = [processor.tokenizer.decode([label]) for label in delta.labels.tolist()]
        return list(zip(tokens, delta.delta.tolist(), weights.tolist(), strict=True))

    # ---- Stopping ----

    def note_time(self) -> None:
        """Count this run's time with those before it."""
        self.state.seconds += time.monotonic() - self._started
        self.state.save()

    def how_to_go_on(self) -> str:
        """After Ctrl-C: where it stopped, what goes on, what can be used already."""
        where, model = self.doing, self.out / "start" if (self.out / "start").exists() else None
        if self.doing == "training":
            from ..trainer.checkpoints import newest_checkpoint

            folder = self.recipe_folder()
            for stage in folder.recipe.stages:
                if not folder.output_of(stage).exists():
                    where = f"stage {stage.number}"
                    model = newest_checkpoint(folder.of_stage(stage)) or model
                    break
                model = folder.output_of(stage)
        elif self.doing.startswith("measuring"):
            model = self.recipe_folder().final
        said = f"Stopped during {where}. To go on: {self.options.command()}"
        return said if model is None else f"{said}\nModel and processor as trained so far: {model}"
