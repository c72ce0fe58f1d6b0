"""CAL on Mini-Gemini: what trains in which stage, one look at the images for both passes, steps through the trainer."""

import pytest
import torch
from transformers import set_seed

import seecal
from seecal import CALTrainer
from seecal.cli.families import check
from seecal.families import image_grids
from seecal.families.module_groups import module_groups
from seecal.recipes.trainable import prepare
from tests.support import processors
from tests.support.builders import Row
from tests.support.raw_data import dataset
from tests.support.sgd import sgd_config
from tests.support.zoo import batch_of, model_of, scaled
from tests.support.zoo_models import ZOO, mgm
from tests.support.zoo_parts import convnext, llama

PROJECTOR = ("model.mining.", "model.multi_modal_projector.")
LANGUAGE_MODEL = ("model.language_model.", "lm_head.")
STAGES = {
    "stage 1": (["projector"], PROJECTOR),
    "stage 2": (["projector", "language_model"], PROJECTOR + LANGUAGE_MODEL),
}
ROWS = [Row([3, "image", 2, "image", -4]), Row([5, -3]), Row([2, "image", -2])]

# It moves all scores of a window alike: its gradient is nothing but rounding
NO_EFFECT = "model.mining.key.1.bias"


def built(name, **options):
    torch.manual_seed(0)
    return scaled(mgm(**options) if options else ZOO[name].model(), ZOO[name])


def cal_step(model, batch):
    seecal.enable_cal(model.train(), seecal.CALOptions(normalize="micro_batch"))
    try:
        output = model(**batch)
        output.loss.backward()
    finally:
        seecal.disable_cal(model)
    return output


# ---- which parts ----


def test_the_groups_have_both_towers_and_the_mining():
    groups = module_groups(model_of("mgm, HD"))
    assert set(groups["projector"]) == {"model.multi_modal_projector", "model.mining"}
    assert set(groups["vision_tower"]) == {"model.vision_tower", "model.vision_tower_aux"}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["mgm", "mgm, HD", "mgm, Gemma"])
def test_gradients_are_in_the_stages_parts_and_in_all_of_them(name, stage, checkpointing):
    train, prefixes = STAGES[stage]
    model = built(name)
    prepare(model, train)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cal_step(model, batch_of(name, ROWS))
    expected = {key for key, _ in model.named_parameters() if key.startswith(prefixes)}
    assert expected > {"model.mining.query.0.weight", "model.mining.key.1.weight", "model.mining.value.1.bias"}
    found = {key for key, one in model.named_parameters() if one.grad is not None}
    assert found == expected
    assert all(one.grad.any() for key, one in model.named_parameters() if key in expected - {NO_EFFECT})


def test_towers_train_when_asked_and_what_no_feature_depends_on_is_left_out():
    model = built("mgm")
    prepare(model, ["vision_tower"])
    cal_step(model, batch_of("mgm", ROWS))
    found = {key for key, one in model.named_parameters() if one.grad is not None}
    assert found == {key for key, one in model.named_parameters() if one.requires_grad}
    assert any(key.startswith("model.vision_tower_aux.encoder.stages.3") for key in found)
    assert any(key.startswith("model.vision_tower.encoder.layers.0") for key in found)
    unused = (
        "model.vision_tower.encoder.layers.1",
        "model.vision_tower.post_layernorm",
        "model.vision_tower_aux.layernorm",
    )
    assert not any(key.startswith(unused) for key in found)
    assert all(key.startswith("model.vision_tower") for key in found)


def test_checkpointed_mining_has_the_same_gradients():
    """Also where transformers is told to use the reentrant kind, which gives frozen towers' features none."""
    gradients = []
    for settings in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = built("mgm")
        prepare(model, ["projector"])
        if settings:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
            model.enable_input_require_grads()
        cal_step(model, batch_of("mgm", ROWS))
        gradients.append({key: one.grad for key, one in model.named_parameters() if one.requires_grad})
    for other in gradients[1:]:
        for key, one in gradients[0].items():
            torch.testing.assert_close(other[key], one, atol=1e-6, rtol=1e-5)


# ---- both passes ----


@pytest.mark.parametrize("name", ["mgm", "mgm, HD"])
def test_both_passes_share_one_pass_through_the_towers(name):
    """So drop path, random as it is, cannot make Δ differ between them."""
    model, calls = built(name), []
    for part in (model.model.vision_tower, model.model.vision_tower_aux, model.model.mining):
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    output = cal_step(model, batch_of(name, ROWS))
    assert output.cal.contrast_tokens > 0
    assert output.cal.visual_delta.delta.abs().mean() > 0.1
    assert sorted(calls) == ["CLIPVisionModel", "ConvNextModel", "MGMMining"]


def test_with_drop_path_only_the_image_is_random():
    """Two steps of one batch: other logits with the image, the same ones without it."""
    model = built("mgm", vision_aux_config=convnext(drop_path_rate=0.9))
    batch = batch_of("mgm", ROWS)
    torch.manual_seed(1)
    first, second = (cal_step(model, batch).cal.visual_delta for _ in range(2))
    seen = first.has_contrast
    assert (first.logit_with - second.logit_with)[seen].abs().max() > 1e-3
    assert torch.equal(first.logit_without[seen], second.logit_without[seen])


@pytest.mark.parametrize("name", [name for name in ZOO if name.startswith("mgm")])
def test_the_self_test_passes(name):
    verdict, sentence = check(model_of(name))
    assert not verdict.leaks
    assert verdict.effect > verdict.rounding, "the image made up for the test changes nothing"
    assert "declared exact" in sentence


# ---- where the tokens of an image lie ----


def test_images_side_by_side_and_tiles():
    plain, large = model_of("mgm").config, model_of("mgm, HD").config
    grids = image_grids.mined(plain, {}, [32, 16], 3)
    assert [(grid.rows, grid.first, grid.tokens, grid.pixels) for grid in grids] == [(4, 0, 16, (n,)) for n in range(3)]
    grids = image_grids.mined(large, {}, [160], 2)
    assert [(grid.rows, grid.first, grid.tokens, grid.pixels) for grid in grids] == [
        (4, 0, 80, (n, 4)) for n in range(2)
    ]
    with pytest.raises(ValueError, match="79 image tokens for 1 images, which have 80 each"):
        image_grids.mined(large, {}, [79], 1)
    with pytest.raises(ValueError, match="tiles alone"):
        image_grids.mined(mgm(image_grid=2, image_size_aux=128).config, {}, [64], 1)


# ---- the trainer ----


@pytest.mark.parametrize(
    ("grid", "options"), [(1, {}), (2, {"image_grid": 2, "image_global": True, "image_size_aux": 128})]
)
def test_steps_through_the_trainer(grid, options, tmp_path):
    """From messages and images: three images, one and none in a batch. The loss of what was seen goes down."""
    processor = processors.mgm(grid)
    set_seed(0)
    model = scaled(mgm(llama(vocab_size=len(processor.tokenizer)), **options), ZOO["mgm"])
    model.config.image_token_id = processor.image_token_id
    prepare(model, ["projector", "language_model"])
    args = sgd_config(tmp_path, 3, 1, optim="adamw_torch", learning_rate=3e-3, max_length=None)
    trainer = CALTrainer(model, args, train_dataset=dataset("mgm"), processing_class=processor)
    before = {name: one.detach().clone() for name, one in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    moved = {name for name, one in trainer.model.named_parameters() if not torch.equal(one, before[name])}
    assert moved | {NO_EFFECT} == {name for name, one in trainer.model.named_parameters() if one.requires_grad}
    assert not any("vision_tower" in name for name in moved)
