"""Families that nobody declared: exact ones work and say so, leaking ones are refused with the reason."""

import logging
from types import MethodType

import pytest
import torch

import seecal
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
