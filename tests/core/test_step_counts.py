"""What a CAL step computes and how often it waits for the device, counted by hooks: never more than the method needs."""

import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import seecal
from seecal import CALOptions
from seecal.core import token_positions
from tests.support import zoo
from tests.support.builders import FAMILIES, MIXED, Row, batch_of, build

# What makes the host wait for a GPU: a value or a size that depends on values is asked for.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
# Whole folders, not words in a path: the checkout may lie in a folder called seecal, with a virtual environment in it.
OURS, TORCH = (Path(package.__file__).parent for package in (seecal, torch))


class Waits(TorchDispatchMode):
    """The operators that would wait for a GPU and whose innermost caller outside torch is a module of seecal."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name.startswith("index") and any(
            one is not None and one.dtype == torch.bool
            for part in args
            if isinstance(part, (list, tuple))
            for one in part
        )
        if name in WAITS or by_mask:
            files = [Path(frame.filename) for frame in traceback.extract_stack()]
            caller = next(file for file in reversed(files) if TORCH not in file.parents and file != Path(__file__))
            if OURS in caller.parents:
                self.found.append((name, caller))
        return function(*args, **(kwargs or {}))


def text_that_counts(batch, image):
    """Text tokens of the samples with a label after an image, up to the token that predicts the last of them: (all of
    these, those after the sample's first image)."""
    total = after = 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        is_image = ids == image
        kept = mask.bool() & ~is_image
        last = [
            column - 1
            for column in range(1, len(ids))
            if labels[column] != -100 and kept[column - 1] and bool(is_image[:column].any())
        ]
        if last:
            total += int(kept[: last[-1] + 1].sum())
            after += int(kept[int(is_image.nonzero()[0]) : last[-1] + 1].sum())
    return total, after


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_count_of_a_step(family, padding, monkeypatch):
    model, image_tokens, pixels = build(family)
    batch = batch_of(MIXED, image_tokens, pixels, padding, extra_padding=13)
    seecal.enable_cal(model.train())
    tokens, heads, towers, rows = [], [], [], []
    model.model.language_model.layers[-1].register_forward_pre_hook(
        lambda _, args: tokens.append(args[0][..., 0].numel())
    )
    model.lm_head.register_forward_pre_hook(lambda *_: heads.append(1))
    model.model.vision_tower.register_forward_pre_hook(lambda *_: towers.append(1))
    for name in ("seecal.core.forward.weighted_sum_of_ce", "seecal.ops.linear_cross_entropy.weighted_sum_of_ce"):
        real = seecal.ops.linear_cross_entropy.weighted_sum_of_ce
        count = lambda hidden, *args, real=real, **rest: (rows.append(len(hidden)), real(hidden, *args, **rest))[1]  # noqa: E731
        monkeypatch.setattr(name, count)
    cal = model(**batch).cal
    main, contrast = tokens
    assert main == cal.main_tokens == int(batch["attention_mask"].sum()), "real tokens and no padding"
    text, after_the_first_image = text_that_counts(batch, 3)
    assert contrast == cal.contrast_tokens == after_the_first_image < text, (
        "what stands before is kept from the main pass"
    )
    assert rows == [int((batch["labels"][:, 1:] != -100).sum())], "one projection, of the label tokens"
    assert (heads, len(towers)) == ([], 1)


WAITING = [
    {},
    {"normalize": "sample"},
    {"contrast": "mask"},
    {"contrast": "blur"},
    {"weighting": "uniform"},
    {"weighting": "vig"},
    {"weighting": "prior", "delta": "logprob"},
    {"padding_free": False},
]


@pytest.mark.parametrize("options", WAITING, ids=str)
def test_the_host_waits_once(options, monkeypatch):
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    batch["contrast_pixel_values"] = batch["pixel_values"] * 0.5
    seecal.enable_cal(model.train(), CALOptions(**options))
    copies = []
    monkeypatch.setattr(
        token_positions,
        "to_host",
        lambda marks, real=token_positions.to_host: (copies.append(marks.shape), real(marks))[1],
    )
    model(**batch)  # the weights of a weighting are looked at in its first batch
    copies.clear()
    with Waits() as waits:
        model(**batch).loss.backward()
    assert copies == [batch["input_ids"].shape]
    assert waits.found == []


def test_the_counter_of_waits_can_count():
    values = torch.arange(5)
    asks = "values[values > 2], values.nonzero(), int(values.sum()), bool((values > 1).any())"
    code = f"def ask(values):\n    return {asks}\n"
    space = {}
    exec(compile(code, str(OURS / "asks.py"), "exec"), space)
    with Waits() as waits:
        space["ask"](values)
    assert [name for name, _ in waits.found] == ["index", "nonzero", "_local_scalar_dense", "_local_scalar_dense"]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3", "mistral3, window"])
def test_other_families_compute_no_more(name):
    model, batch = zoo.model_of(name, "sdpa"), zoo.batch_of(name, zoo.rows_for(name))
    seecal.enable_cal(model.train())
    try:
        cal = model(**batch).cal
    finally:
        seecal.disable_cal(model.eval())
    text, after_the_first_image = text_that_counts(batch, zoo.ZOO[name].placeholder)
    assert cal.main_tokens == int(batch["attention_mask"].sum())
    by_segments = name in ("qwen2_5_vl", "idefics3")  # the others need dense masks, and compute all of the text
    assert cal.contrast_tokens == (after_the_first_image if by_segments else text)


def test_rows_of_one_length_stay_rows():
    """Nothing to save: the batch runs as it came, and so does the pass without the image."""
    model, image_tokens, pixels = build("llava")
    batch = batch_of([Row([3, "image", 2, -4])] * 3, image_tokens, pixels)
    shapes = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
    seecal.enable_cal(model.train())
    cal = model(**batch).cal
    assert shapes == [(3, 3 + image_tokens + 6), (3, 3 + 2 + 3)]
    assert cal.contrast_tokens == 3 * 8
