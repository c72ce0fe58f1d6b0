"""Kept features are the tower's own: same loss, same weights after training; refused by name where they would not be."""

import copy

import pytest
import torch

import seecal
from seecal.models.feature_cache import VisionFeatureCache
from tests.support import zoo
from tests.support.builders import MIXED, batch_of, build

KEPT = ["llava", "vipllava", "llava_next", "llava_onevision", "internvl", "ovis2", "paligemma", "gemma3", "aya_vision"]
KEPT += ["cohere2_vision", "granite4_vision", "llama4"]
REFUSED = ["qwen2_vl", "mgm", "mistral3", "idefics2", "gemma4", "mllama"]


def frozen_tower(model):
    model.requires_grad_(True)
    model.get_submodule("model.vision_tower").requires_grad_(False)
    return model


def trained(model, batches, steps, cache=None):
    """(losses, the weights afterwards) of some steps with CAL."""
    seecal.enable_cal(model.train())
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.05)
    losses = []
    for step in range(steps):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    seecal.disable_cal(model)
    return losses, model.state_dict()


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_training_is_the_same_with_the_cache(family):
    model, tokens, pixels = build(family)
    batches = [batch_of(MIXED, tokens, pixels, seed=seed) for seed in (1, 2)]
    plain, kept = (frozen_tower(copy.deepcopy(model)) for _ in range(2))
    expected, weights = trained(plain, batches, 6)
    cache = VisionFeatureCache(kept)
    with cache.on():
        losses, found = trained(kept, batches, 6)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-3), "nothing was learned, so nothing was compared"
    for name, one in weights.items():
        torch.testing.assert_close(found[name], one, rtol=1e-4, atol=1e-5)
    assert cache.misses * 2 == cache.hits, "six steps with two batches: each image is computed once"
    assert not cache.full


@pytest.mark.parametrize("name", KEPT)
def test_families_whose_features_can_be_kept(name):
    model, batch = zoo.model_of(name), zoo.batch_of(name, zoo.rows_for(name))
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    expected = seecal.visual_delta(model, batch)
    try:
        cache = VisionFeatureCache(model.requires_grad_(False))
        with cache.on():
            for _ in range(2):
                found = seecal.visual_delta(model, batch)
                torch.testing.assert_close(found.delta, expected.delta, rtol=1e-4, atol=1e-4)
        assert cache.misses == cache.hits > 0
        other = zoo.other_pixels(batch)
        with cache.on():
            changed = seecal.visual_delta(model, other)
        torch.testing.assert_close(changed.delta, seecal.visual_delta(model, other).delta, rtol=1e-4, atol=1e-4)
    finally:
        for parameter, before in needed.items():
            parameter.requires_grad_(before)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused_by_name(name):
    model = copy.deepcopy(zoo.model_of(name)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"cache_vision_features.*Set it to false"):
        VisionFeatureCache(model)


def test_a_tower_that_trains_or_varies_is_refused():
    model, _, _ = build("llava")
    with pytest.raises(ValueError, match=r"vision_tower\..* trains, so its features change"):
        VisionFeatureCache(model.requires_grad_(True))
    frozen_tower(model)
    model.model.vision_tower.encoder.layers[0].mlp.fc1 = torch.nn.Sequential(
        model.model.vision_tower.encoder.layers[0].mlp.fc1, torch.nn.Dropout(0.1)
    )
    with pytest.raises(ValueError, match=r"mlp\.fc1\.1 is dropout"):
        VisionFeatureCache(model)
    model, _, _ = build("llava")
    frozen_tower(model).model.vision_tower.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        VisionFeatureCache(model)


def test_memory_is_bounded_and_what_goes_beyond_is_computed_each_time():
    model, tokens, pixels = build("llava")
    batch = batch_of(MIXED, tokens, pixels)
    images = len(batch["pixel_values"])
    frozen_tower(model)
    one = 17 * 32 * 4  # bytes of one image: 16 patches and the class token, 32 wide, float32
    cache = VisionFeatureCache(model, limit_gib=2.5 * one / 2**30)
    expected = seecal.visual_delta(model, batch).delta
    with cache.on():
        for _ in range(3):
            torch.testing.assert_close(seecal.visual_delta(model, batch).delta, expected)
    assert len(cache._found) == 2
    assert (cache.hits, cache.misses) == (2 * 2, images + 2 * (images - 2))
    assert cache.full


def test_the_model_is_as_before_afterwards_and_other_precisions_are_other_features():
    model, tokens, pixels = build("llava")
    frozen_tower(model)
    batch = batch_of(MIXED, tokens, pixels)
    cache = VisionFeatureCache(model)
    with cache.on():
        seecal.visual_delta(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            seecal.visual_delta(model, batch)
    assert cache.hits == 0
    assert "forward" not in model.model.vision_tower.__dict__


def test_each_image_is_kept_by_itself():
    """A slice of the batch would hold the whole batch, however few of its images are kept."""
    model, tokens, pixels = build("llava")
    batch = batch_of(MIXED, tokens, pixels)
    cache = VisionFeatureCache(frozen_tower(model))
    with cache.on():
        seecal.visual_delta(model, batch)
    kept = [tensor for tensors in cache._found.values() for tensor in tensors]
    assert len(cache._found) == len(batch["pixel_values"])
    assert sum(one.untyped_storage().nbytes() for one in kept) == sum(one.nbytes for one in kept) == cache._bytes


def test_other_outputs_of_the_tower_are_its_own():
    """Evaluation may ask for attentions, which are not kept; in training that is told."""
    model, tokens, pixels = build("llava", attention="eager")
    batch = batch_of(MIXED, tokens, pixels)
    tower = frozen_tower(model).model.vision_tower
    with torch.no_grad():
        expected = tower(batch["pixel_values"], output_attentions=True)
        cache = VisionFeatureCache(model)
        with cache.on():
            found = tower(batch["pixel_values"], output_attentions=True)
            assert cache.hits == cache.misses == 0
            tower.train()
            with pytest.raises(ValueError, match="in training this model calls its vision tower in another way"):
                tower(batch["pixel_values"], output_attentions=True)
    assert len(found.attentions) == len(expected.attentions) > 0
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
