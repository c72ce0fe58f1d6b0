"""Every model family: both routes against the model's own forward, blank images for ranks without one, a training step."""

import pytest
import torch
from transformers import CONFIG_MAPPING

import seecal
from seecal import CALOptions
from seecal.core.packing import Layout
from seecal.families.table import FAMILIES, family_of
from tests.support import zoo
from tests.support.zoo_models import ZOO
from tests.support.zoo_parts import VIDEO


def packs_of(name):
    """Whether this kind's main pass may run on one row without padding."""
    return FAMILIES[name.split(",")[0]].packs_main


EVERY = list(ZOO)
SETTINGS = [
    (name, attention, padding) for name in ZOO for attention in ZOO[name].attentions for padding in zoo.PADDINGS
]
OTHER_DEFINITION = [name for name in ZOO if not FAMILIES[name.split(",")[0]].exact]


def test_every_declared_family_is_swept():
    known = {name for name in FAMILIES if name in CONFIG_MAPPING}  # the oldest transformers has no Molmo 2
    assert {ZOO[name].model().config.model_type for name in ZOO} == known
    assert len(known) > 25


@pytest.mark.parametrize(("name", "attention", "padding"), SETTINGS)
def test_both_routes_equal_the_models_own_masked_forward(name, attention, padding):
    routes, own = zoo.measure(name, attention, padding)
    exact = family_of(zoo.model_of(name)).exact
    assert float(own.delta.abs().max()) > 0.01
    assert float(own.delta[own.contrast].abs().mean()) >= 0.1, "the image hardly matters: this would pass on anything"
    for route, got in routes.items():
        assert torch.equal(got.sample, own.sample), route
        assert torch.equal(got.position, own.position), route
        assert torch.equal(got.has_contrast, own.contrast), route
        assert not got.delta[~own.contrast].any(), route
        checks = [("with", got.logit_with, own.with_image)]
        if exact or route == "mask":
            checks += [("without", got.logit_without, own.without), ("delta", got.delta, own.delta)]
        for what, ours, theirs in checks:
            torch.testing.assert_close(
                ours, theirs, atol=own.tolerance, rtol=0, msg=lambda m, r=route, w=what: f"{r}, {w}: {m}"
            )


@pytest.mark.parametrize("name", OTHER_DEFINITION)
@pytest.mark.parametrize("padding", zoo.PADDINGS)
def test_dropping_where_it_is_not_masking_is_what_the_note_says(name, padding):
    """The image leaves no trace: other pixels change the logit with the image and not the one without."""
    model, batch = zoo.model_of(name), zoo.batch_of(name, zoo.rows_for(name), padding)
    first = seecal.visual_delta(model, batch)
    second = seecal.visual_delta(model, zoo.other_pixels(batch))
    seen = first.has_contrast
    assert float((first.logit_with - second.logit_with)[seen].abs().max()) > 0.01
    torch.testing.assert_close(first.logit_without[seen], second.logit_without[seen], atol=0, rtol=0)
    if not family_of(model).cross_attention:  # there truth() has said it: the model's own forward without pixels
        own = zoo.truth_of_short_rows(name, model, batch)
        torch.testing.assert_close(first.delta, own.delta, atol=own.tolerance, rtol=0)
        assert family_of(model).note


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl"])
def test_a_state_is_not_carried_into_the_next_sample(name):
    model, batch = zoo.model_of(name), zoo.batch_of(name, zoo.rows_for(name))
    with pytest.raises(ValueError, match=r"padding_free=True .* carries a state"):
        seecal.visual_delta(model, batch, options=CALOptions(padding_free=True))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_renumbered_positions_fail(name, monkeypatch):
    """The sweep notices when the remaining tokens lose their original positions: plain ones and M-RoPE's three axes."""
    monkeypatch.setattr(Layout, "take_positions", lambda self, positions: self.filled.cumsum(1) - 1)
    routes, own = zoo.measure(name, "eager", "right")
    assert float((routes["drop, padded"].delta - own.delta).abs().max()) > 100 * own.tolerance
    torch.testing.assert_close(routes["mask"].delta, own.delta, atol=own.tolerance, rtol=0)


# ---------------------------------------------------------------- training


def run(model, batch, **options):
    """(output, {name: gradient} of the parameters that got one) of one CAL step."""
    model.train()
    model.zero_grad()
    # normalize: the loss of one rank, however many there are
    seecal.enable_cal(model, CALOptions(normalize="micro_batch", **options))
    try:
        output = model(**batch)
        output.loss.backward()
    finally:
        seecal.disable_cal(model)
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    model.eval()
    return output, found


def step(model, batch):
    """(loss, gradients) of one CAL step."""
    output, found = run(model, batch)
    return output.loss.item(), found


def assert_same_gradients(ours, theirs):
    for name, gradient in ours.items():
        scale = max(1.0, float(gradient.abs().max()))
        other = theirs.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, atol=1e-5 * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", EVERY)
def test_a_training_step_with_and_without_checkpointing(name):
    model, batch = zoo.model_of(name), zoo.batch_of(name, zoo.rows_for(name))
    loss, plain = step(model, batch)
    assert torch.tensor(loss).isfinite()
    assert all(bool(gradient.isfinite().all()) for gradient in plain.values())
    assert any(bool(gradient.any()) for name, gradient in plain.items() if "vision" in name or "visual" in name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        again, checkpointed = step(model, batch)
    finally:
        model.gradient_checkpointing_disable()
    assert again == pytest.approx(loss, abs=1e-5)
    assert set(checkpointed) == set(plain)
    assert_same_gradients(checkpointed, plain)


@pytest.mark.parametrize(("name", "attention", "padding"), [one for one in SETTINGS if packs_of(one[0])])
def test_padding_free_is_padded(name, attention, padding):
    """Both passes in one row each, nothing but real slots in them: the loss, Δ and every gradient stay the same."""
    model, batch = zoo.model_of(name, attention), zoo.batch_of(name, zoo.rows_for(name), padding)
    padded, expected = run(model, batch, padding_free=False)
    packed, gradients = run(model, batch, padding_free=True)
    assert padded.cal.main_tokens == batch["input_ids"].numel()
    real = int(batch["attention_mask"].sum())
    assert packed.cal.main_tokens == real < padded.cal.main_tokens
    assert packed.cal.contrast_tokens < padded.cal.contrast_tokens
    scale = max(1.0, float(padded.cal.visual_delta.delta.abs().max()))
    torch.testing.assert_close(packed.cal.visual_delta.delta, padded.cal.visual_delta.delta, atol=1e-5 * scale, rtol=0)
    torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=1e-5)
    assert set(gradients) == set(expected)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("name", [name for name in ZOO if not packs_of(name)])
def test_what_cannot_be_packed_keeps_its_padding(name):
    model, batch = zoo.model_of(name), zoo.batch_of(name, zoo.rows_for(name))
    padded, _ = run(model, batch)
    assert padded.cal.main_tokens == batch["input_ids"].numel()
    if family_of(model).packs:  # cross-attention: the pass without the image, which has none, may be packed
        packed, _ = run(model, batch, padding_free=True)
        assert packed.cal.main_tokens == padded.cal.main_tokens
        torch.testing.assert_close(packed.loss, padded.loss, atol=1e-5, rtol=1e-5)
        return
    with pytest.raises(ValueError, match="padding_free=True with a decoder"):
        run(model, batch, padding_free=True)


@pytest.mark.parametrize("name", EVERY)
def test_a_rank_without_images_visits_the_same_parameters(name, monkeypatch):
    """Two ranks, this one with text only: every parameter that an image would reach gets a gradient, of zeros."""
    model = zoo.model_of(name)
    images, text = zoo.batch_of(name, zoo.rows_for(name)), zoo.batch_of(name, zoo.TEXT_ONLY)
    _, reached = step(model, images)
    loss, alone = step(model, text)
    monkeypatch.setattr("seecal.core.forward.world_size", lambda: 2)
    if family_of(model).cross_attention:
        with pytest.raises(ValueError, match="Give every rank's batch at least one image"):
            step(model, text)
        return
    among_two, ranked = step(model, text)
    assert among_two == pytest.approx(loss, abs=1e-6)
    if ZOO[name].placeholder == VIDEO:  # the blank image has parts that no video needs
        ranked = {name: gradient for name, gradient in ranked.items() if name in reached}
    assert set(ranked) == set(reached)
    assert not any(bool(ranked[name].any()) for name in set(ranked) - set(alone))
    assert_same_gradients(alone, ranked)
