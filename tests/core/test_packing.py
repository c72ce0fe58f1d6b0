"""Where a packed row must not be, or must be taken care of: labels after padding, outputs of every layer, low precision."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import seecal
from seecal import CALOptions
from seecal.core import main_pass
from seecal.core.packing import MAX_DENSE_TOKENS, attention_inputs, lay_out, use_packed
from seecal.core.state import state_of
from seecal.ops import segment_attention as segments
from seecal.ops.float8 import fp8_linears
from tests.ops.test_segment_attention import fake_kernel
from tests.support.builders import IMAGE, MIXED, Row, batch_of, build


def losses(model, batch, choices=(False, "auto", True)):
    found = []
    for padding_free in choices:
        seecal.enable_cal(model.train(), CALOptions(padding_free=padding_free))
        found.append(model(**batch))
        seecal.disable_cal(model)
    return found


@pytest.mark.parametrize("padding", ["right", "left"])
def test_every_token_a_label(padding):
    """As ``labels = ids.clone(); labels[padding] = -100`` makes them: on the left the first label comes after padding."""
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels, padding)
    batch["labels"] = batch["input_ids"].masked_fill((batch["attention_mask"] == 0) | (batch["input_ids"] == 3), -100)
    plain = model(**batch).loss
    padded, auto = losses(model, batch, (False, "auto"))
    torch.testing.assert_close(auto.loss, padded.loss, atol=1e-5, rtol=1e-5)
    seecal.enable_cal(model.train(), CALOptions(weighting="uniform"))
    torch.testing.assert_close(model(**batch).loss, plain, atol=1e-5, rtol=1e-5)
    seecal.disable_cal(model)
    if padding == "right":
        torch.testing.assert_close(losses(model, batch, (True,))[0].loss, padded.loss, atol=1e-5, rtol=1e-5)
        return
    assert auto.cal.main_tokens == batch["input_ids"].numel()
    with pytest.raises(ValueError, match=r"row 0, column \d+ comes right after padding"):
        losses(model, batch, (True,))


def test_labels_on_padding_that_is_masked():
    """Padding with the id of the end of turn, left in the labels: counted as the model itself counts them."""
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    batch["labels"][1, -3:] = 7
    padded, auto = losses(model, batch, (False, "auto"))
    assert len(auto.cal.weights) == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(auto.loss, padded.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by_config", [False, True])
def test_the_outputs_of_every_layer_stay_as_the_batch_came(by_config):
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    asked = {} if by_config else {"output_hidden_states": True}
    model.config.output_hidden_states = by_config
    model.model.language_model.config.output_hidden_states = by_config
    seecal.enable_cal(model.train())
    output = model(**batch, **asked)
    assert [one.shape[:2] for one in output.hidden_states] == [batch["input_ids"].shape] * len(output.hidden_states)


def test_autocast_reaches_the_kernel_in_its_own_precision(monkeypatch):
    """Rotary embeddings leave float32 queries under autocast, which scaled_dot_product_attention would cast by itself."""
    calls, kinds = [], set()
    kernel = fake_kernel(calls)

    def noting(query, key, value, *rest):
        kinds.update((query.dtype, key.dtype, value.dtype))
        return kernel(query, key, value, *rest)

    monkeypatch.setattr(segments, "suits_the_kernel", lambda *_: True)
    monkeypatch.setattr(segments, "variable_length_kernel", lambda: noting)
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        padded, packed = losses(model, batch, (False, True))
    assert kinds == {torch.bfloat16}
    assert len(calls) == 6
    assert abs(packed.loss.item() - padded.loss.item()) < 0.02 * padded.loss.item()


def test_prefixes_have_a_limit(monkeypatch):
    """What would take too much memory is computed again, with the same result."""
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    (kept,) = losses(model, batch, ("auto",))
    layers, width = 3, 64
    before = 6 + 2 + 3 + 6  # text before the first image of the rows that have one
    monkeypatch.setattr(main_pass, "MOST_PREFIX_BYTES", before * layers * 2 * width * 4)
    (at_the_limit,) = losses(model, batch, ("auto",))
    monkeypatch.setattr(main_pass, "MOST_PREFIX_BYTES", before * layers * 2 * width * 4 - 1)
    (again,) = losses(model, batch, ("auto",))
    assert at_the_limit.cal.contrast_tokens == kept.cal.contrast_tokens == again.cal.contrast_tokens - before
    torch.testing.assert_close(again.loss, kept.loss, atol=1e-5, rtol=1e-5)


def test_one_head_of_a_group_is_kept():
    mask = segments.SegmentMask(
        (2, 3), torch.device("cpu"), recorded=(prefixes := segments.Prefixes(torch.tensor([0, 2]), 2))
    )
    query = torch.randn(1, 4, 5, 8)
    key, value = (torch.randn(1, 2, 5, 8).repeat_interleave(2, 1) for _ in range(2))
    torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert prefixes._kept[0][0].shape == (1, 2, 2, 8)
    back_key, back_value = prefixes.recall(query, key)
    assert torch.equal(back_key, key[:, :, [0, 2]])
    assert torch.equal(back_value, value[:, :, [0, 2]])


# ---------------------------------------------------------------- what is left behind


def test_steps_are_counted_anew_after_disable():
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    options = CALOptions(contrast_every=2)
    seecal.enable_cal(model.train(), options)
    model(**batch)
    state_of(model).step = 1  # as a trainer that is over
    assert model(**batch).cal.contrast_tokens == 0
    seecal.disable_cal(model)
    seecal.enable_cal(model, options)
    assert [model(**batch).cal.contrast_tokens > 0 for _ in range(3)] == [True, False, True]


def test_batches_that_bring_their_weights_are_counted_too():
    """Else ranks with and without such batches would take the image away in different forwards."""
    model, image_tokens, pixels = build("llava")
    batch = batch_of(MIXED, image_tokens, pixels)
    seecal.enable_cal(model.train(), CALOptions(contrast_every=2))
    given = {**batch, "token_weights": torch.ones(batch["labels"].shape)}
    found = [model(**one).cal.contrast_tokens > 0 for one in (given, batch, batch)]
    assert found == [False, False, True]


@pytest.mark.parametrize("rank", [8, 16])
def test_adapters_keep_their_precision_whatever_their_rank(rank):
    model, *_ = build("llava")
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj"]))
    decoder = model.model.language_model
    with fp8_linears(decoder):
        changed = {name for name, module in decoder.named_modules() if "forward" in module.__dict__}
    assert changed
    assert any(name.endswith("q_proj.base_layer") for name in changed)
    assert not any("lora" in name for name in changed)
    assert adapted.peft_config


def test_a_compiled_model_still_trains():
    model, image_tokens, pixels = build("llava")
    batch = batch_of([MIXED[0], Row([4, "image", 2, -3])], image_tokens, pixels)
    seecal.enable_cal(model.train())
    expected = model(**batch).loss
    torch._dynamo.reset()
    got = torch.compile(model, backend="eager")(**batch).loss
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


RAGGED = np.array([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]], dtype=bool)
EVEN = np.ones((3, 4), dtype=bool)


@pytest.mark.parametrize(
    ("asked", "keep", "attention", "options", "expected"),
    [
        ("auto", RAGGED, "sdpa", {"dense": False}, True),
        ("auto", RAGGED, "eager", {"dense": True}, True),
        ("auto", EVEN, "sdpa", {"dense": False}, False),  # no padding to save
        (True, EVEN, "sdpa", {"dense": False}, True),
        (False, RAGGED, "sdpa", {"dense": False}, False),
        ("auto", RAGGED, "sdpa", {"dense": False, "packs": False}, False),
        (True, RAGGED, "sdpa", {"dense": False, "packs": False}, "carries a state"),
        ("auto", RAGGED, "flash_attention_2", {"dense": False}, True),
        ("auto", RAGGED, "flash_attention_2", {"dense": True}, False),  # it takes no mask
        ("auto", RAGGED, "flash_attention_2", {"dense": False, "takes_bounds": False}, False),  # it would mix samples
        (True, RAGGED, "flash_attention_2", {"dense": False, "takes_bounds": False}, "cannot keep the samples"),
        (True, RAGGED, "flash_attention_3", {"dense": True}, "cannot keep the samples"),
        ("auto", RAGGED, "flex_attention", {"dense": False}, False),
        (True, RAGGED, "flex_attention", {"dense": False}, "cannot keep the samples"),
        ("auto", RAGGED, "sdpa", {"dense": False, "takes_bounds": False}, True),  # a mask needs no bounds
        (True, np.zeros((2, 3), dtype=bool), "sdpa", {"dense": False}, False),
    ],
)
def test_when_a_row_is_packed(asked, keep, attention, options, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            use_packed(asked, keep, attention, **options)
    else:
        assert use_packed(asked, keep, attention, **options) is expected


def test_a_dense_mask_has_a_limit():
    keep = np.ones((2, MAX_DENSE_TOKENS // 2 + 1), dtype=bool)
    keep[0, 1:] = False
    assert use_packed("auto", keep, "sdpa", dense=True)
    keep[0, : MAX_DENSE_TOKENS // 2] = True
    assert not use_packed("auto", keep, "sdpa", dense=True)
    assert use_packed("auto", keep, "sdpa", dense=False)
    assert use_packed(True, keep, "sdpa", dense=True)


def test_flash_attention_gets_the_bounds_of_the_samples():
    layout = lay_out(RAGGED, True, torch.device("cpu"))
    given = attention_inputs(None, layout, "flash_attention_2", torch.float32)
    assert given.pop("attention_mask") is None
    assert {name: value if isinstance(value, int) else value.tolist() for name, value in given.items()} == {
        "cu_seq_lens_q": [0, 4, 6, 9],
        "cu_seq_lens_k": [0, 4, 6, 9],
        "max_length_q": 4,
        "max_length_k": 4,
    }


@pytest.mark.parametrize(
    "rows", [[Row([1, "image", 1, -1])], [Row([2, "image", 1, -1]), Row([5, -2])], [Row([1])]], ids=str
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_of_one_token(rows, attention):
    """Grouped heads: transformers lays the heads of a group where the tokens are, so one token must not go by segments."""
    model, image_tokens, pixels = build("llava", attention)
    batch = batch_of(rows, image_tokens, pixels)
    padded, packed = losses(model, batch, (False, True))
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.cal.visual_delta.delta, padded.cal.visual_delta.delta, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("padding_free", [False, "auto"])
def test_padding_with_the_image_tokens_id_is_padding(padding, padding_free):
    """Some tokenizers pad with a special token that the template also writes for an image."""
    model, image_tokens, pixels = build("llava")
    batch = batch_of([Row([2, "image", 3, -9]), Row([3, -4])], image_tokens, pixels, padding)
    options = CALOptions(padding_free=padding_free)
    expected = seecal.visual_delta(model, batch, options=options)
    text = {name: value[1:] for name, value in batch.items() if name != "pixel_values"}
    text["input_ids"] = text["input_ids"].masked_fill(text["attention_mask"] == 0, IMAGE)
    got = seecal.visual_delta(model, text, options=options)
    assert not got.has_contrast.any()
    assert not got.delta.any()
    torch.testing.assert_close(got.logit_with, expected.logit_with[expected.sample == 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefixes_are_recorded_once_and_used_up(monkeypatch, checkpointing):
    """Checkpointing runs the layers again in the backward: what they record then, nobody would ever take out."""
    kept = []

    class Noted(segments.Prefixes):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self)

    monkeypatch.setattr(main_pass, "Prefixes", Noted)
    model, image_tokens, pixels = build("llava")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seecal.enable_cal(model.train())
    model(**batch_of(MIXED, image_tokens, pixels)).loss.backward()
    assert [prefixes.layers for prefixes in kept] == [0]
