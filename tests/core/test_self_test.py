"""Families that nobody declared: exact ones work and say so, leaking ones are refused with the reason."""

import logging
from types import MethodType

import pytest
import torch

import seecal
from seecal.core.self_test import with_other_pixels
from seecal.families.table import FAMILIES
from tests.support.builders import MIXED, Row, batch_of, build


@pytest.fixture
def unheard_of(monkeypatch):
    """A LLaVA of a family that has no row."""
    model, tokens, pixels = build("llava")
    model.config.model_type = "unheard_of"
    return model, batch_of(MIXED, tokens, pixels), (tokens, pixels)


def test_an_exact_one_works_and_says_so_once(unheard_of, caplog):
    model, batch, _ = unheard_of
    declared, *_ = build("llava")
    expected = seecal.enable_cal(declared.train())(**batch)
    seecal.enable_cal(model.train())
    with caplog.at_level(logging.WARNING, logger="seecal"):
        output = model(**batch)
        model(**batch)
    torch.testing.assert_close(output.loss, expected.loss)
    assert caplog.text.count("unheard_of") == 1
    assert "CAL is exact" in caplog.text


def test_the_size_of_its_logits_is_no_leak(unheard_of, caplog):
    """Rounding grows with what is rounded: logits of a million differ by more than small ones do, and leak as little."""
    model, batch, _ = unheard_of
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e6)
    seecal.enable_cal(model.train())
    with caplog.at_level(logging.WARNING, logger="seecal"):
        model(**batch)
    assert "CAL is exact" in caplog.text


def test_one_that_leaks_is_refused_with_the_reason(unheard_of):
    """The image also comes in through an input of the decoder that nobody knows."""
    model, batch, _ = unheard_of
    decoder, base = model.model.language_model, model.model
    plain_decoder, plain_base = decoder.forward, base.forward

    def with_hint(self, *args, hint=None, **kwargs):
        output = plain_decoder(*args, **kwargs)
        if hint is not None:
            output.last_hidden_state = output.last_hidden_state + hint
        return output

    def send_hint(self, *args, pixel_values=None, **kwargs):
        handle = decoder.register_forward_pre_hook(
            lambda _, a, k: (a, {**k, "hint": pixel_values.mean()}), with_kwargs=True, prepend=True
        )
        try:
            return plain_base(*args, pixel_values=pixel_values, **kwargs)
        finally:
            handle.remove()

    decoder.forward, base.forward = MethodType(with_hint, decoder), MethodType(send_hint, base)
    seecal.enable_cal(model.train())
    with pytest.raises(ValueError, match=r"unheard_of.*still changes with the pixels"):
        model(**batch)


@pytest.mark.parametrize("name", ["pixel_values_aux", "image_embeds", "vision_feature_list"])
def test_one_that_leaks_by_another_input_of_the_image_is_refused(unheard_of, name):
    """The tower's pixels change, and so does whatever else of the batch shows the image."""
    model, batch, _ = unheard_of
    base, decoder = model.model, model.model.language_model
    look, decode = base.forward, decoder.forward

    def look_twice(self, **kwargs):
        hint = kwargs.pop(name)
        self.hint = (hint[0] if isinstance(hint, list) else hint).mean()
        return look(**kwargs)

    def with_hint(self, *args, **kwargs):
        output = decode(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state + base.hint
        return output

    base.forward, decoder.forward = MethodType(look_twice, base), MethodType(with_hint, decoder)
    hint = torch.rand(2, 3)
    batch[name] = [hint] if name.endswith("list") else hint
    seecal.enable_cal(model.train())
    with pytest.raises(ValueError, match=r"unheard_of.*still changes with the pixels"):
        model(**batch)


def test_what_tells_an_images_size_or_place_stays():
    pixels = torch.tensor([[0.0, 1.0]])
    batch = {
        "pixel_values": [pixels],
        "images": pixels,
        "image_sizes": pixels,
        "image_grid_thw": pixels.long(),
        "video_second_per_grid": pixels,
        "pixel_attention_mask": pixels,
        "input_features": pixels,  # sound
        "input_ids": pixels.long(),
    }
    found = with_other_pixels(batch)
    assert {name for name in batch if found[name] is not batch[name]} == {"pixel_values", "images"}
    assert found["images"].tolist() == found["pixel_values"][0].tolist() == [[0.0, 2.0]]


def test_pixels_that_change_nothing_are_mentioned(unheard_of, caplog):
    model, batch, _ = unheard_of
    seecal.enable_cal(model.train())
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
    with caplog.at_level(logging.WARNING, logger="seecal"):
        model(**batch)
    assert "pixels changed nothing in the pass with the image either" in caplog.text


HEADS = {
    "divided": lambda logits: logits / 6,
    "multiplied": lambda logits: logits * 1.5,
    "soft-capped": lambda logits: 30 * torch.tanh(logits / 30),
    "shifted": lambda logits: logits + torch.linspace(0, 1, logits.shape[-1]),
}


def with_head(model, change, names_its_columns):
    """The model with a class of its own that does something to the logits."""
    parent = type(model)

    class Changed(parent):
        def forward(self, input_ids=None, logits_to_keep=0, **inputs):
            output = parent.forward(self, input_ids=input_ids, logits_to_keep=logits_to_keep, **inputs)
            output.logits = change(output.logits)
            return output

    class WithoutColumns(Changed):
        def forward(self, input_ids=None, **inputs):
            return super().forward(input_ids=input_ids, **inputs)

    model.__class__ = Changed if names_its_columns else WithoutColumns
    return model


@pytest.mark.parametrize("names_its_columns", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_one_whose_class_changes_its_logits_is_refused(unheard_of, head, names_its_columns):
    model, batch, _ = unheard_of
    with_head(model, HEADS[head], names_its_columns)
    seecal.enable_cal(model.train())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"unheard_of.*scales, caps or shifts.*Declare the family.*head="):
            model(**batch)


@pytest.mark.parametrize("low", [True, False], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("head", [None, "divided", "soft-capped"])
def test_rounding_of_the_logits_is_no_other_head(unheard_of, low, head):
    model, batch, _ = unheard_of
    if head is not None:
        with_head(model, HEADS[head], True)
    if low:
        model, batch["pixel_values"] = model.bfloat16(), batch["pixel_values"].bfloat16()
    seecal.enable_cal(model.train())
    with torch.autocast("cpu", torch.bfloat16, enabled=not low):
        if head is None:
            model(**batch)
            return
        with pytest.raises(ValueError, match="scales, caps or shifts"):
            model(**batch)


def test_dropout_of_the_training_is_no_other_head(unheard_of, caplog):
    model, batch, _ = unheard_of
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    seecal.enable_cal(model.train())
    with caplog.at_level(logging.WARNING, logger="seecal"):
        model(**batch)
    assert "CAL is exact" in caplog.text
    assert model.training


def test_one_that_carries_state_over_the_gap_works_and_says_what_it_does(unheard_of, caplog):
    """A running mean over the inputs stands for a recurrent state: masking leaves the image's trace in it."""
    model, batch, _ = unheard_of
    decoder = model.model.language_model
    plain = decoder.forward

    def with_state(self, *args, **kwargs):
        embeds = kwargs["inputs_embeds"]
        steps = torch.arange(1, embeds.shape[1] + 1)[None, :, None]
        kwargs["inputs_embeds"] = embeds + embeds.cumsum(1) / steps
        return plain(*args, **kwargs)

    decoder.forward = MethodType(with_state, decoder)
    seecal.enable_cal(model.train())
    options = seecal.CALOptions(padding_free=False)
    with caplog.at_level(logging.WARNING, logger="seecal"):
        seecal.visual_delta(model, batch, options=options)
    assert "differs from masking" in caplog.text


def test_a_batch_that_cannot_tell_is_not_the_last_word(unheard_of, caplog):
    model, batch, (tokens, pixels) = unheard_of
    seecal.enable_cal(model.train())
    with caplog.at_level(logging.WARNING, logger="seecal"):
        model(**batch_of([Row([4, -3])], tokens, pixels))
        assert "unheard_of" not in caplog.text
        model(**batch)
    assert "unheard_of" in caplog.text


def test_declared_families_are_not_tested_again(caplog):
    assert "llava" in FAMILIES
    model, tokens, pixels = build("llava")
    with caplog.at_level(logging.WARNING, logger="seecal"):
        seecal.visual_delta(model, batch_of(MIXED, tokens, pixels))
    assert not caplog.text
