"""Both routes against the model's own masked top-level forward."""

import pytest
import torch

import seecal
from seecal import CALOptions
from seecal.core.packing import Layout
from tests.support.builders import FAMILIES, IMAGE, MIXED, Row, batch_of, build


def label_tokens(labels):
    return [
        (row, column)
        for row in range(labels.shape[0])
        for column in range(1, labels.shape[1])
        if labels[row, column] != -100
    ]


@torch.no_grad()
def reference(model, batch):
    """Δ, whether there is a contrast, and both logits at every label, from the model's own full forwards."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    rest = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    with_image = model(attention_mask=mask, position_ids=positions, use_cache=False, **rest).logits
    masked = mask * (ids != IMAGE)
    without = model(attention_mask=masked, position_ids=positions, use_cache=False, **rest).logits
    out = []
    for row, column in label_tokens(labels):
        before = column - 1
        contrast = bool(masked[row, before]) and bool((ids[row, :before] == IMAGE).any())
        target = labels[row, column]
        first, second = with_image[row, before, target], without[row, before, target]
        out.append((first - second if contrast else 0.0, contrast, first, second if contrast else first))
    delta, contrast, first, second = zip(*out, strict=True)
    return torch.tensor(delta), torch.tensor(contrast), torch.tensor(first), torch.tensor(second)


def tolerance(delta):
    return 2e-5 * max(1.0, float(delta.abs().max()))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_routes_equal_the_models_own_masked_forward(family, attention, padding):
    model, image_tokens, pixels = build(family, attention)
    batch = batch_of(MIXED, image_tokens, pixels, padding)
    delta, contrast, with_image, without = reference(model, batch)
    assert float(delta[contrast].abs().mean()) >= 0.1, "the image does not matter here: this would pass on anything"
    routes = [CALOptions(padding_free=packed) for packed in (True, False, "auto")] + [CALOptions(contrast="mask")]
    for options in routes:
        got = seecal.visual_delta(model, batch, contrast=options.contrast, options=options)
        assert got.has_contrast.tolist() == contrast.tolist()
        assert list(zip(got.sample.tolist(), got.position.tolist(), strict=True)) == label_tokens(batch["labels"])
        assert not got.delta[~got.has_contrast].any()
        for ours, truth in (
            (got.delta, delta),
            (got.logit_with, with_image),
            (got.logit_without, without),
        ):
            torch.testing.assert_close(ours, truth, atol=tolerance(delta), rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_renumbered_positions_fail(family, monkeypatch):
    """The comparison above notices when the remaining tokens lose their original positions."""
    monkeypatch.setattr(Layout, "take_positions", lambda self, positions: self.filled.cumsum(1) - 1)
    model, image_tokens, pixels = build(family)
    batch = batch_of(MIXED, image_tokens, pixels)
    delta, *_ = reference(model, batch)
    got = seecal.visual_delta(model, batch, options=CALOptions(padding_free=False))
    assert float((got.delta - delta).abs().max()) > 100 * tolerance(delta)


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_window_shorter_than_the_sequence_is_exact(padding_free):
    """A sliding window measures distance in slots of the full row, so the mask is cut out of the full one."""
    model, image_tokens, pixels = build("llava", sliding_window=12)
    batch = batch_of(MIXED, image_tokens, pixels)
    delta, contrast, *_ = reference(model, batch)
    assert float(delta[contrast].abs().mean()) >= 0.1
    for contrast_kind in ("drop", "mask"):
        options = CALOptions(padding_free=padding_free)
        got = seecal.visual_delta(model, batch, contrast=contrast_kind, options=options)
        torch.testing.assert_close(got.delta, delta, atol=tolerance(delta), rtol=0)


@pytest.mark.parametrize("contrast", ["drop", "mask"])
@pytest.mark.parametrize(
    "rows",
    [
        [Row([5, -1])],
        [Row([5, -1]), Row([4, -3])],
        [Row([3, "image", 2])],
        [Row([3, "image", -1])],
        [Row(["image", 2, -1])],
        [Row([2, "image", 1, -3])],
        [Row([3, "image", 2]), Row([4])],
    ],
    ids=[
        "text only",
        "all text only",
        "no label",
        "only after an image",
        "image first",
        "one sample",
        "no label at all",
    ],
)
def test_edges(rows, contrast):
    model, image_tokens, pixels = build("llava")
    batch = batch_of(rows, image_tokens, pixels)
    got = seecal.visual_delta(model, batch, contrast=contrast)
    count = len(label_tokens(batch["labels"]))
    assert len(got) == count
    if count:
        delta, has_contrast, *_ = reference(model, batch)
        assert got.has_contrast.tolist() == has_contrast.tolist()
        torch.testing.assert_close(got.delta, delta, atol=tolerance(delta), rtol=0)


def test_a_label_in_column_0_is_never_counted():
    model, image_tokens, pixels = build("llava")
    batch = batch_of([Row([2, "image", 2, -3])], image_tokens, pixels)
    batch["labels"][0, 0] = 17
    got = seecal.visual_delta(model, batch)
    assert got.position.tolist() == [20, 21, 22]
