"""``seecal demo --compare``: CAL and plain training from one stage 1, measured on the same held-out drawings.

    out/images/ start/ eval.json held_out.json   as the demo has them
    out/align.yaml align/                        stage 1, once
    out/data-SEED.json                           what stage 2 trains on: both arms on the same in the same order
    out/ARM-SEED.yaml ARM-SEED/                  stage 2 of an arm (cal, uniform)
    out/measured/                                every held-out answer of every model
    out/compare.json report.html                 the differences with their intervals; plain (A) beside CAL (B)

Run again in the same folder it goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from . import emoji, files
from .compared import ARMS, Compared, Tokens, differences, report, token_figures
from .measure import Measured
from .plan import Plan
from .run import Demo, carry_out
from .state import DemoOptions, open_state

__all__ = ["compare"]

_ALIGN = files.Part("align.yaml", data="data-0.json", run="align", stages=("align",))


def compare(options: DemoOptions, console: Console) -> int:
    """The whole comparison; the exit code as :func:`seecal.demo.run.run` has it.

    Raises:
        ValueError: fewer seeds than one, or a weighting: both are made.
    """
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: a comparison needs one training of either arm or more")
    if options.weighting != "cal":
        raise ValueError(f"--compare trains with cal and with uniform: take --weighting {options.weighting} out")
    return carry_out(Comparison(options, open_state(options), console))


class Comparison(Demo):
    """The running comparison."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.trainings = len(ARMS) * self.options.seeds
        # Of one seed all arms before the next seed: what is stopped early has pairs
        self.parts = {
            (arm, seed): files.Part(
                f"{arm}-{seed}.yaml", "align/final", f"data-{seed}.json", f"{arm}-{seed}", ("tune",)
            )
            for seed in range(self.options.seeds)
            for arm in ARMS
        }

    def go(self) -> Any:
        self.prepare_images()
        self.prepare_machine()
        if not (self.out / _ALIGN.file).exists():
            model, processor = self.start_model()
            self.write_files(self.make_plan(model, processor))
            del model
        code = self.train_part("stage 1", _ALIGN)
        if code:
            return code
        self.measured("align")
        for (arm, seed), part in self.parts.items():
            code = self.train_part(f"the training {arm}-{seed}", part)
            if code:
                return code
            self.measured(part.run)
        self.doing = "drawing the page"
        page = self.draw_comparison()
        return self.compared(page)

    def write_files(self, found: Plan) -> None:
        """Records and recipes, last that of stage 1: where it is, the others are whole."""
        options = self.options
        for seed in range(options.seeds):
            asked = files.questions(
                self.items, max(found.align_steps, found.tune_steps), options.batch_size, options.seed + seed
            )
            files.write_data(self.out / f"data-{seed}.json", asked, self.images)
        shown = {split: files.held_out(self.items, split, found.held_out) for split in files.HELD_OUT}
        files.write_eval(self.out / "eval.json", shown, self.images)
        for (arm, seed), part in self.parts.items():
            self.write_recipe(found, part, arm, options.seed + seed)
        self.write_recipe(found, _ALIGN, "cal", options.seed)

    def train_part(self, doing: str, part: files.Part) -> int:
        """0, or an exit code."""
        folder = self.recipe_folder(part.file)
        if folder.final.exists():
            return 0
        code = self.train(folder)
        self.doing = doing if code else self.doing
        return code

    # ---- Measuring ----

    def measured(self, name: str) -> dict[tuple[str, str], Measured]:
        """Of the model in ``out/NAME/final``: (split, question) -> all answers; measured once."""
        from .measure import measure_each

        path = self.out / "measured" / f"{name}.json"
        if not path.exists():
            self.doing = f"measuring {name}"
            model, processor = self.load(self.out / name / "final")
            asked = self.asked()
            found = {}
            with (
                self.progress.task(f"measure {name}", sum(map(len, asked.values())), unit="question") as task,
                self.measuring(model),
            ):
                for key, pairs in asked.items():
                    found["/".join(key)] = measure_each(model, processor, pairs, on_batch=task.advance).told()
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(found), "utf8")
            part.replace(path)
        told = json.loads(path.read_text("utf8"))
        return {tuple(key.split("/")): Measured.of(rows) for key, rows in told.items()}  # type: ignore[misc]

    def asked(self) -> files.Asked:
        """Name, kind and description of each held-out drawing."""
        found = files.read_eval(self.out / "eval.json")
        for split in files.HELD_OUT:
            items = files.held_out(self.items, split, len(found[split, "name"]))
            found[split, "describe"] = [(self.images[item.hexcode], emoji.described(item)) for item in items]
        return found

    def draw_comparison(self) -> Path:
        """Held-out descriptions scored by the plain model, CAL's and the one before: the page shows the first two."""
        names = {"uniform": "uniform-0/final", "cal": "cal-0/final", "stage-1": "align/final"}
        return self.draw_page({name: self.out / folder for name, folder in names.items()})

    def compared(self, page: Path) -> Compared:
        """All that the report says, also in ``compare.json``."""
        seeds = range(self.options.seeds)
        of_arm = {arm: [self.measured(f"{arm}-{seed}") for seed in seeds] for arm in ARMS}
        steps = sum(stage.settings["max_steps"] for stage in self.recipe_folder("cal-0.yaml").recipe.stages)
        found = Compared(
            options=self.options,
            machine=self.state.machine,
            seconds=self.state.seconds + time.monotonic() - self._started,
            steps=steps,
            before=self.measured("align"),
            rows=differences(of_arm),
            tokens=self.tokens(),
            asked=self.asked(),
            items=self.items,
            page=page,
        )
        (self.out / "compare.json").write_text(json.dumps(found.told(), indent=1) + "\n", "utf8")
        return found

    def tokens(self) -> dict[str, Tokens]:
        """Δ and CAL's weights of the descriptions on the page: before stage 2 and after it with CAL."""
        from ..scoring.read import read_scores

        described = {
            f"{split}/{item.hexcode}": emoji.described(item)
            for split in files.HELD_OUT
            for item in files.held_out(self.items, split, len(self.items))
        }
        return {name: token_figures(read_scores(self.out / "scores" / name), described) for name in ("stage-1", "cal")}

    # ---- Stopping and showing ----

    def show(self, results: Any) -> None:
        report(results, self.console)

    def how_to_go_on(self) -> str:
        from ..trainer.checkpoints import newest_checkpoint

        said, runs = (
            f"Stopped during {self.doing}. To go on: {self.options.command()}",
            [_ALIGN, *self.parts.values()],
        )
        found = [self.out / "start"]
        for folder in (self.out / part.run for part in runs):
            found += [newest_checkpoint(folder / "stage-1") or folder / "final"] if folder.exists() else []
        models = [model for model in found if model.exists()]
        return f"{said}\nModel and processor as trained so far: {models[-1]}" if models else said
