"""Every contrast and every weighting in one short training run each, on the micro VLM's real weights; slots are counted.

A run takes ten seconds: four that stand for a kind of pass each are always made, the others in ``make test-all``.
"""

import math
from itertools import combinations

import pytest
import torch
from datasets import Dataset, Features, Image, Sequence, Value
from PIL import Image as Pillow
from PIL import ImageDraw

import seecal
from seecal import CONTRASTS, CALConfig, CALTrainer
from seecal.data.collators.vision import VisionCollator
from seecal.models import micro

pytestmark = pytest.mark.real
STEPS = 2
# (weighting, contrast): the contrasts under CAL, the weightings under the contrast that costs least
RUNS = [
    *(("cal", contrast) for contrast in CONTRASTS),
    *((name, "drop") for name in seecal.WEIGHTINGS if name != "cal"),
]
ALWAYS = {("cal", "drop"), ("cal", "swap"), ("vig", "drop"), ("uniform", "drop")}
NO_CONTRAST = {"uniform", "dft"}
# So that few weights are at a bound, and both of VIG's happen
OPTIONS = {name: {"alpha": 0.0, "beta": 50.0} for name in ("cal", "negative")}
OPTIONS |= {"dpa": {"alpha": 0.0}, "vig": {"threshold": -0.2}}


def slow_unless_always(run):
    return () if run in ALWAYS else pytest.mark.slow


def picture(shape, colour):
    image = Pillow.new("RGB", (160, 120), "white")
    getattr(ImageDraw.Draw(image), shape)((40, 20, 120, 100), fill=colour)
    return image


def record(name, question, answer, images=()):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": turns, "images": list(images)}


RECORDS = [
    record("circle", "What is shown here?", "A red circle on a white sheet.", [picture("ellipse", "red")]),
    record("square", "What is it?", "A blue square.", [picture("rectangle", "blue")]),
    record("text", "Name a colour of the sky.", "Blue, and grey when it rains."),
]


def dataset():
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"id": Value("string"), "messages": [message], "images": Sequence(Image())})
    return Dataset.from_list(RECORDS, features=features)


@pytest.fixture(scope="module")
def built():
    """(model, processor, the weights that train as they are shipped); the word table and the tower stay."""
    model, processor = micro.build()
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    return model, processor, {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def text_that_counts(batch, image_id):
    """TokenPositions of the samples with an image that are text, come after it and before the slot of their last label."""
    count = 0
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        if image_id in ids:
            last = max(column for column, label in enumerate(labels) if label != -100)
            count += sum(one != image_id for one in ids[ids.index(image_id) : last])
    return count


class Run:
    """One run from the shipped weights: its records, its log, what went through tower and decoder, what moved."""

    def __init__(self, built, weighting, contrast, folder):
        model, processor, shipped = built
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in shipped:
                    parameter.copy_(shipped[name])
        self.records, self.slots, self.towers = [], [], 0
        parts = model.model.language_model, model.model.vision_tower
        hooks = [
            parts[0].layers[0].register_forward_pre_hook(self._decoder),
            parts[1].register_forward_pre_hook(self._tower),
            model.register_forward_hook(lambda _, args, output: self.records.append(output.cal)),
        ]
        config = CALConfig(
            str(folder),
            weighting=weighting,
            contrast=contrast,
            **OPTIONS.get(weighting, {}),
            max_steps=STEPS,
            per_device_train_batch_size=len(RECORDS),
            train_sampling_strategy="sequential",
            learning_rate=1e-4,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = CALTrainer(model, config, train_dataset=dataset(), processing_class=processor)
        try:
            trainer.train()
        finally:
            for hook in hooks:
                hook.remove()
            seecal.disable_cal(model)
            model.zero_grad()
        self.logs = [one for one in trainer.state.log_history if "cross_entropy" in one]
        self.moved = {name for name, one in model.named_parameters() if not torch.equal(one, shipped.get(name, one))}

    def _decoder(self, module, args):
        self.slots.append(args[0][..., 0].numel())

    def _tower(self, *args):
        self.towers += 1


@pytest.fixture(scope="module")
def run(built, tmp_path_factory):
    """(weighting, contrast) → its Run, made once."""
    made = {}

    def get(weighting, contrast):
        if (weighting, contrast) not in made:
            made[weighting, contrast] = Run(built, weighting, contrast, tmp_path_factory.mktemp("run"))
        return made[weighting, contrast]

    return get


@pytest.mark.parametrize(("weighting", "contrast"), [pytest.param(*one, marks=slow_unless_always(one)) for one in RUNS])
def test_trains_and_costs_what_its_passes_require(run, built, weighting, contrast):
    this, batch = run(weighting, contrast), VisionCollator(built[1])(RECORDS)
    real = int(batch["attention_mask"].sum())
    if weighting in NO_CONTRAST:
        expected = 0
    elif contrast == "drop":
        expected = text_that_counts(batch, built[0].config.image_token_id)
        assert 0 < expected < real / 2
    else:  # the masked pass is the released code's: on the padded rows
        expected = batch["input_ids"].numel() if contrast == "mask" else real
    assert [(one.main_tokens, one.contrast_tokens) for one in this.records] == [(real, expected)] * STEPS
    assert this.slots == [real, *([expected] if expected else [])] * STEPS
    assert this.towers == (2 if CONTRASTS[contrast].on_pixels else 1) * STEPS
    assert [one["contrast_token_share"] for one in this.logs] == pytest.approx([expected / (real + expected)] * STEPS)
    for log, cal in zip(this.logs, this.records, strict=True):
        assert math.isfinite(log["loss"])
        assert log["loss"] == pytest.approx(float(cal.loss_sum.detach() / cal.weight_sum), rel=1e-4)
        assert ("delta_mean" in log) == (expected > 0)
    # The first gradient, at the same weights for all, goes into every tensor that trains
    assert this.moved == set(built[2])
    assert this.logs[1]["cross_entropy"] < this.logs[0]["cross_entropy"]


@pytest.mark.parametrize(
    "weighting", [pytest.param(one, marks=slow_unless_always((one, "drop"))) for one in seecal.WEIGHTINGS]
)
def test_text_alone_is_weighed_as_its_formula_says(run, weighting):
    cal = run(weighting, "drop").records[0]
    found = cal.visual_delta
    alone = found.sample == RECORDS.index(RECORDS[-1])
    assert not found.has_contrast[alone].any()
    if weighting in ("cal", "negative", "dpa"):
        expected = torch.zeros_like(cal.weights)  # alpha of these runs
    elif weighting in ("uniform", "vig"):
        expected = torch.ones_like(cal.weights)
    elif weighting == "prior":
        plain = 1 - found.logprob_without.exp()
        expected = plain / plain[alone].mean()
    else:
        expected = found.logprob_with.exp()
    torch.testing.assert_close(cal.weights[alone], expected[alone], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_all_weights_are_another_ones(run):
    """At the first step all runs stand at the same weights and batch: they differ in what is measured and how it weighs."""
    weights = {one: run(*one).records[0].weights for one in RUNS}
    assert set(weights["uniform", "drop"].tolist()) == {1.0}
    assert set(weights["vig", "drop"].tolist()) == {0.0, 1.0}
    assert all(len(one.unique()) > 3 for key, one in weights.items() if key[0] not in ("uniform", "vig"))
    for one, other in combinations(RUNS, 2):
        apart = float((weights[one] - weights[other]).abs().max())
        if {one, other} == {("cal", "drop"), ("cal", "mask")}:
            assert apart < 1e-3, "dropping the image is masking it"
        else:
            assert apart > 0.02, (one, other)
