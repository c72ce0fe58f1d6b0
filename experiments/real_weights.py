"""The demo's model, with real weights: CAL against plain training from one shared alignment, true and swapped answers.

    found = run(seed, noise, options, folder)

real_weights.yaml has what is expected. A run is the demo's own recipe: its two stages with plain weights once a seed (the
alignment), then stage 2 again from there, on questions in another order, with the arm's weights.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from seecal import verbosity
from seecal.demo import emoji, files
from seecal.demo.compute import bf16_pays, precision
from seecal.demo.measure import Measured, measure_each
from seecal.demo.plan import Plan, of_steps
from seecal.demo.report import commonest_share
from seecal.models import micro
from seecal.models.feature_cache import VisionFeatureCache
from seecal.models.generate import load
from seecal.recipes.folder import RunFolder
from seecal.recipes.recipe import read
from seecal.recipes.run import Run

from .kept import once, weight_shares

BATCH, ALIGNMENT, TUNING = 16, 66, 40  # records of a step; steps of either training
RATE = 1e-4
QUESTIONS = ("kind", "name", "describe")
Asked = list[tuple[emoji.Emoji, emoji.Answer]]


def run(
    seed: int,
    noise: float,
    options: Mapping[str, Any],
    folder: Path,
    *,
    steps: int | None = None,
    learning_rate: float = RATE,
) -> dict[str, Any]:
    """One training of an arm, measured on all unseen drawings of known concepts.

    Args:
        seed: of the alignment, of the questions and of which answers are swapped; all arms of a seed share the three.
        noise: share of the training answers that are exchanged between drawings, within a kind of question.
        options: of :class:`seecal.CALOptions`; ``{}`` is CAL as the paper has it.
        folder: keeps images and alignments for other runs.
        steps: at most so many in either training, to see that it runs.

    Returns:
        ``arrays``, each [n], the drawings in one order always: ``exact`` (0 or 1, "What kind of thing is it?"),
        ``nll_visual`` (nats, mean over the tokens of the name), ``nll_filler`` (nats, mean over the tokens of the
        description that no image tells). ``facts`` of the alignment: the same as means, and the share that the commonest
        answer would get right. ``shares`` of the weights at alpha, inside and at beta. ``seconds``.
    """
    return _Setting(seed, folder, steps).run(noise, options, learning_rate)


class _Setting:
    """A seed's data and alignment."""

    def __init__(self, seed: int, folder: Path, steps: int | None) -> None:
        verbosity.quiet()
        self.seed, self.steps, self.folder = seed, steps, folder
        self.name = f"seed-{seed}" if steps is None else f"seed-{seed}-steps-{steps}"
        (folder / self.name).mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # another process may make the same
            self.bf16 = once(folder / "bf16.json", bf16_pays)[0]
            self.images = emoji.render_openmoji(emoji.catalogue(), folder / "images")
            self.start()
        self.items = [item for item in emoji.catalogue() if item.hexcode in self.images]
        self.shown = files.held_out(self.items, emoji.HELD_IMAGE, len(self.items))

    def run(self, noise: float, options: Mapping[str, Any], rate: float) -> dict[str, Any]:
        begun = time.monotonic()
        with FileLock(self.folder / self.name / "lock"):
            facts, aligned = self.align()
        aligned_by, name = time.monotonic(), f"{self.name}-arm-{os.getpid()}"
        shutil.rmtree(self.folder / name, ignore_errors=True)
        count = self.count(TUNING)
        asked = noisy(files.questions(self.items, count, BATCH, 1000 + self.seed), noise, self.seed)
        part = files.Part(f"{name}.yaml", aligned, f"{name}.json", name, ("tune",))
        plan = Plan(0, count, len(self.shown), f"real_weights.yaml: {count} steps from {aligned}")
        weighting = str(options.get("weighting", "cal"))
        rest = {name: value for name, value in options.items() if name != "weighting"}
        done = self.train(part, plan, asked, weighting, {"learning_rate": rate, **rest})
        trained_by = time.monotonic()
        found = self.measured(done.final)
        (log,) = (json.loads(path.read_text("utf8")) for path in done.path.glob("stage-1/trainer_state.json"))
        shutil.rmtree(done.path)  # half a gigabyte; the figures are what is kept
        for file in (part.file, part.data):
            (self.folder / file).unlink()
        seconds = {"alignment": aligned_by - begun, "training": trained_by - aligned_by}
        seconds["measuring"] = time.monotonic() - trained_by
        return {
            "arrays": arrays(found),
            "facts": facts,
            "shares": weight_shares(log["log_history"]),
            "bfloat16": self.bf16,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }

    def count(self, steps: int) -> int:
        return steps if self.steps is None else max(min(steps, self.steps), 2)

    # ---- The alignment ----

    def align(self) -> tuple[dict[str, float], str]:
        """(facts, the model's folder below ours): made once, and gone on with where it was stopped."""
        count, place = self.count(ALIGNMENT), f"{self.name}/aligned"
        part = files.Part(f"{self.name}.yaml", "start", f"{self.name}.json", place)
        plan = of_steps(count, len(self.shown), f"real_weights.yaml: {count} steps")
        asked = files.questions(self.items, count, BATCH, self.seed)
        final = self.train(part, plan, asked, "uniform", {}).final
        shutil.rmtree(self.folder / place / "stage-1" / "model", ignore_errors=True)  # as large as the one that is kept
        return once(self.folder / self.name / "facts.json", lambda: self.facts(final)), f"{place}/final"

    def start(self) -> None:
        """The model as shipped."""
        start = self.folder / "start"
        if not start.exists():
            with verbosity.no_bars():
                model, processor = micro.build()
            files.write_model(start, model, processor)

    def facts(self, final: Path) -> dict[str, float]:
        means = {name: round(float(np.nanmean(values)), 4) for name, values in arrays(self.measured(final)).items()}
        answers = [answer for _, answer in self.asked("kind")]
        return {**means, "commonest": round(commonest_share(self.items, "kind", answers), 4), "unseen": len(self.shown)}

    # ---- Both ----

    def train(
        self, part: files.Part, plan: Plan, asked: Asked, weighting: str, settings: Mapping[str, Any]
    ) -> RunFolder:
        """A recipe of the demo's, run to its end by ``seecal train``'s own path."""
        files.write_data(self.folder / part.data, asked, self.images)
        text = files.recipe(
            self.folder,
            plan,
            batch_size=BATCH,
            weighting=weighting,
            seed=self.seed,
            on_cpu=not torch.cuda.is_available(),
            bf16=self.bf16,
            part=part,
            tune=settings,
        )
        (self.folder / part.file).write_text(text, "utf8")
        run = Run(read(str(self.folder / part.file)), quiet=True)
        if code := run.go(resume=True):
            raise SystemExit(code)
        return run.folder

    def asked(self, question: str) -> list[tuple[Path, emoji.Answer]]:
        """The question about each unseen drawing, with its true answer."""
        return [(self.images[one.hexcode], emoji.answer(one, question, random.Random(1))) for one in self.shown]

    def measured(self, final: Path) -> dict[str, Measured]:
        model, processor = load(str(final))
        cache = VisionFeatureCache(model.requires_grad_(False))
        with precision(model.device, self.bf16), cache.on():
            return {question: measure_each(model, processor, self.asked(question)) for question in QUESTIONS}


def arrays(found: Mapping[str, Measured]) -> dict[str, np.ndarray]:
    """The endpoints, a number a drawing."""
    name, described = found["name"], found["describe"]
    return {
        "exact": found["kind"].exact,
        "nll_visual": name.word_nll / name.words,
        "nll_filler": described.filler_nll / described.filler,
    }


def noisy(asked: Asked, share: float, seed: int) -> Asked:
    """The questions; exactly ``round(share · n)`` have the answer of another drawing, within a kind of question."""
    from .nano import swapped

    kinds = {text: kind for kind, text in emoji.QUESTIONS.items()}
    records = [
        {
            "messages": [{"role": "user", "content": answer.question}, {"role": "assistant", "content": answer.text}],
            "kind": kinds[answer.question],
            "visual": _spans(answer),
        }
        for _, answer in asked
    ]
    texts = [one["messages"][1]["content"] for one in swapped(records, share, seed)]
    return [
        (item, emoji.Answer(answer.question, ((text, True),)))
        for (item, answer), text in zip(asked, texts, strict=True)
    ]


def _spans(answer: emoji.Answer) -> list[tuple[int, int]]:
    spans, place = [], 0
    for text, seen in answer.pieces:
        if seen:
            spans.append((place, place + len(text)))
        place += len(text)
    return spans
