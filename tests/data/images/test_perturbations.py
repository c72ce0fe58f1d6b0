"""Contrasts that keep an image in place: what they do to pixels, repeatably, and Δ against a second full forward."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import seecal
from seecal import CALConfig, CALOptions, CALTrainer
from seecal.core.contrasts import GRID
from seecal.data.collators.vision import VisionCollator
from seecal.data.images.perturbations import contrast_images
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor


def picture(seed=0, size=(48, 36)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def one(image, contrast, strength=0.5, name="a", epoch=0):
    return np.asarray(contrast_images([[image]], [name], contrast, strength, epoch)[0][0]).astype(float)


@pytest.mark.parametrize("strength", [0.5, 0.7, 0.9, 1.0])
def test_patch_mask_covers_that_share_of_a_grid(strength):
    image = picture(size=(GRID * 4, GRID * 3))
    changed, plain = one(image, "patch_mask", strength), np.asarray(image).astype(float)
    grey = (changed == 127).all(-1).reshape(GRID, 3, GRID, 4).all((1, 3))
    same = (changed == plain).all(-1).reshape(GRID, 3, GRID, 4).all((1, 3))
    assert grey.sum() == round(strength * GRID * GRID)
    assert (grey | same).all()


@pytest.mark.parametrize("strength", [1.0, 10.0])
def test_blur_of_a_point_is_a_gaussian_of_that_width(strength):
    size = 101
    values = np.zeros((size, size, 3), dtype=np.uint8)
    values[size // 2 - 8 : size // 2 + 9, size // 2 - 8 : size // 2 + 9] = 255
    changed = one(Image.fromarray(values), "blur", strength)[..., 0]
    steps = np.arange(size) - size // 2
    spread = np.sqrt((changed.sum(0) * steps**2).sum() / changed.sum())
    expected = np.sqrt(strength**2 + (17**2 - 1) / 12)  # variances add up
    assert abs(spread - expected) < 0.06 * expected


@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_blur_is_the_weighted_mean_of_the_neighbours(strength):
    size, reach = 64, int(4 * strength)
    image = picture(3, (size, size))
    around = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * strength**2))
    around = np.outer(around, around) / around.sum() ** 2
    values, changed = np.asarray(image).astype(float), one(image, "blur", strength)
    for row, column in [(32, 32), (20, 41), (45, 17), (17, 46)]:  # away from the edges
        near = values[row - reach : row + reach + 1, column - reach : column + reach + 1]
        expected = (near * around[..., None]).sum((0, 1))
        # Pillow makes its Gaussian of boxes; the values blurred here spread over 256 levels
        assert np.abs(changed[row, column] - expected).max() < 5
        assert np.abs(values[row, column] - expected).max() > 20


def test_noise_is_normal_and_kept_inside_the_range():
    values = np.asarray(picture(1, (200, 200))).astype(float)
    changed = one(picture(1, (200, 200)), "noise", 0.2)
    inside = (values > 127 - 20) & (values < 127 + 20)
    moved = np.sort((changed - values)[inside] / (255 * 0.2))
    for at, share in [(-1.5, 0.0668), (-1.0, 0.1587), (0.0, 0.5), (1.0, 0.8413), (1.5, 0.9332)]:
        assert abs((moved < at).mean() - share) < 0.01
    assert (changed.min(), changed.max()) == (0, 255)
    assert abs((changed[values == 255] == 255).mean() - 0.5) < 0.05, "beyond white is white"


def test_noise_has_that_standard_deviation():
    grey = Image.new("RGB", (200, 200), (127, 127, 127))
    changed = one(grey, "noise", 0.1)
    assert abs(changed.std() - 25.5) < 0.5
    assert abs(changed.mean() - 127) < 0.5


def test_swap_takes_another_records_image_at_this_ones_size():
    images = [[Image.new("RGB", (10, 20), "red")], [], [Image.new("RGB", (7, 5), "blue")]]
    changed = contrast_images(images, ["a", "b", "c"], "swap", 0.0, 0)
    assert [[image.size for image in mine] for mine in changed] == [[(10, 20)], [], [(7, 5)]]
    assert changed[0][0].getpixel((3, 3)) == (0, 0, 255)
    assert changed[2][0].getpixel((3, 3)) == (255, 0, 0)
    slope = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], (30, 1, 3)))  # 60 wide
    wider = contrast_images([[slope], [picture(0, (180, 30))]], ["a", "b"], "swap", 0.0, 0)[1][0]
    columns = np.asarray(wider)[15, :, 0].astype(float)
    expected = ((np.arange(180) + 0.5) / 3 - 0.5) * 4  # between the centres of the columns it comes from
    assert np.abs(columns - expected)[6:-6].max() <= 1
    alone = contrast_images(images[:1], ["a"], "swap", 0.0, 0, spare=Image.new("RGB", (9, 9), "white"))
    assert alone[0][0].getpixel((3, 3)) == (255, 255, 255)
    with pytest.raises(ValueError, match=r"^a: .*swap"):
        contrast_images(images[:1], ["a"], "swap", 0.0, 0)


@pytest.mark.parametrize("contrast", ["patch_mask", "noise"])
def test_random_ones_depend_on_record_and_epoch_and_nothing_else(contrast):
    first = one(picture(), contrast)
    assert (first == one(picture(), contrast)).all()
    assert (first != one(picture(), contrast, epoch=1)).any()
    assert (first != one(picture(), contrast, name="b")).any()
    neighbours = contrast_images([[picture(5)], [picture()]], ["z", "a"], contrast, 0.5, 0)
    assert (first == np.asarray(neighbours[1][0])).all()


def test_what_is_no_picture_is_named():
    with pytest.raises(ValueError, match=r"record 3: .*ndarray"):
        contrast_images([[np.zeros((3, 4, 3))]], ["record 3"], "blur", 1.0, 0)


@pytest.fixture(scope="module")
def batches():
    # the data set's own images are of one colour, which blurring leaves as they are
    records = [{**one, "images": [picture(index)]} for index, one in enumerate(tiny_dataset(4))]
    processor = tiny_llava_processor()
    return records, lambda contrast, **kw: VisionCollator(processor, contrast=contrast, **kw)(records)


def record(name, *colours):
    images = [Image.new("RGB", (16, 16), colour) for colour in colours]
    told = [{"role": "user", "content": "a photo"}, {"role": "assistant", "content": "a photo"}]
    return {"id": name, "messages": told, "images": images}


BROKEN = {"id": "broken", "messages": [], "images": []}


@pytest.mark.parametrize("rest", ["images of others", "the same image", "a broken record", "text", "a stream"])
def test_an_image_to_swap_with_is_drawn_from_the_data(rest, caplog):
    """By record and epoch, whatever this collator has seen; a record for which there is none has no contrast."""
    others = {
        "images of others": [record(str(n), colour) for n, colour in enumerate(["blue", "green", "white", "grey"])],
        "the same image": [record("same", "red"), record("blue", "blue")],
        "a broken record": [BROKEN, record("blue", "blue")],
        "text": [record("text")],
        "a stream": None,
    }[rest]
    red = record("red", "red")

    def made(seen, epoch=0):
        collator = VisionCollator(tiny_llava_processor(), contrast="swap")
        collator.draw_spares_from(None if others is None else [red, *others])
        for batch in seen:
            collator(batch)
        collator.epoch = epoch
        return collator([record("words"), red])

    first, later = made([]), made([[record("x", "yellow")], [record("y", "black"), record("z", "white")]])
    assert torch.equal(first["contrast_pixel_values"], later["contrast_pixel_values"])
    found = others is not None and rest != "text"
    assert first["contrast_missing"].tolist() == [False, not found]
    assert torch.equal(first["contrast_pixel_values"], first["pixel_values"]) != found
    assert ("record 'red': neither its batch nor" in caplog.text) != found
    if rest == "images of others":
        drawn = {made([], epoch)["contrast_pixel_values"].sum().item() for epoch in range(8)}
        assert len(drawn) > 1, "another one in another epoch"


@pytest.mark.parametrize("keys", [[False, True], [True, True], [False, False]])
def test_rows_without_another_image_have_no_contrast(keys):
    """In the pass itself too: not 0 as measured, but as not measured."""
    batch = dict(
        VisionCollator(tiny_llava_processor(), contrast="swap")([record("red", "red"), record("blue", "blue")])
    )
    plain = seecal.visual_delta(tiny_llava(), batch, contrast="swap")
    found = seecal.visual_delta(tiny_llava(), {**batch, "contrast_missing": torch.tensor(keys)}, contrast="swap")
    missing = torch.tensor(keys)[plain.sample]
    assert torch.equal(found.has_contrast, plain.has_contrast & ~missing)
    assert torch.equal(found.delta, plain.delta.masked_fill(missing, 0))
    dropped = seecal.visual_delta(tiny_llava(), {**batch, "contrast_missing": torch.tensor(keys)}, contrast="drop")
    assert torch.equal(dropped.has_contrast, plain.has_contrast), "another contrast needs no other image"


@pytest.mark.parametrize("contrast", ["patch_mask", "blur", "noise", "swap"])
def test_delta_is_the_difference_of_two_full_forwards(batches, contrast):
    _, make = batches
    model = tiny_llava().eval()
    batch = dict(make(contrast, strength=CALOptions(contrast=contrast).strength))
    assert batch["contrast_pixel_values"].shape == batch["pixel_values"].shape
    assert not torch.equal(batch["contrast_pixel_values"], batch["pixel_values"])
    got = seecal.visual_delta(model, batch, contrast=contrast)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = [
            model(**inputs, pixel_values=batch[name]).logits[got.sample, got.position - 1, got.labels]
            for name in ("pixel_values", "contrast_pixel_values")
        ]
    assert got.has_contrast.any()
    expected = torch.where(got.has_contrast, logits[0] - logits[1], 0.0)
    assert float(expected.abs().mean()) > 0.01
    torch.testing.assert_close(got.delta, expected, atol=2e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def test_both_rows_run_once_more_and_no_more(batches):
    _, make = batches
    model = seecal.enable_cal(tiny_llava().train(), CALOptions(contrast="blur"))
    batch = dict(make("blur", strength=10.0))
    tokens = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args: tokens.append(args[0][..., 0].numel())
    )
    towers = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: towers.append(1))
    output = model(**batch)
    output.loss.backward()
    assert tokens == [int(batch["attention_mask"].sum())] * 2
    assert (output.cal.main_tokens, output.cal.contrast_tokens) == tuple(tokens)
    assert len(towers) == 2


def test_without_the_inputs_of_the_collator_it_says_what_to_do(batches):
    _, make = batches
    model = tiny_llava()
    with pytest.raises(ValueError, match=r"contrast_pixel_values.*VisionCollator"):
        seecal.visual_delta(model, dict(make(None)), contrast="swap")


def test_eval_and_generate_do_not_mind_the_extra_inputs(batches):
    _, make = batches
    model = tiny_llava().eval()
    batch = dict(make("blur", strength=10.0))
    plain = {name: value for name, value in batch.items() if not name.startswith("contrast_")}
    expected = model(**plain).loss
    assert torch.equal(seecal.enable_cal(model, CALOptions(contrast="blur"))(**batch).loss, expected)


@pytest.mark.parametrize("contrast", ["patch_mask", "blur", "noise", "swap"])
def test_the_trainer_makes_them_in_training_only_and_tells_the_epoch(contrast, tmp_path):
    config = CALConfig(
        str(tmp_path),
        contrast=contrast,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        eval_strategy="epoch",
        save_strategy="no",
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
    )
    model = tiny_llava()
    before = copy.deepcopy(model.lm_head.weight)
    trainer = CALTrainer(
        model,
        config,
        train_dataset=tiny_dataset(8),
        eval_dataset=tiny_dataset(4),
        processing_class=tiny_llava_processor(),
    )
    epochs = []
    collator = trainer.data_collator
    make = collator._without_content
    collator._without_content = lambda prepared: (epochs.append(collator.epoch), make(prepared))[1]
    trainer.train()
    assert epochs == [0, 0, 1, 1]
    assert not torch.equal(model.lm_head.weight, before)
    logged = [entry for entry in trainer.state.log_history if "contrast_token_share" in entry]
    assert all(abs(entry["contrast_token_share"] - 0.5) < 1e-6 for entry in logged)
