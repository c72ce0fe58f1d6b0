"""Which part of an image each token is: the model's own tower and the family's own processor are asked."""

from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image

from seecal import VisionCollator
from seecal.data.collators.image_tokens import image_token_ids
from seecal.families import image_grids
from seecal.families.table import FAMILIES, decoder_of, family_of
from seecal.scoring.alignment import _layer_of, _looked_at, _picture
from tests.support import processors
from tests.support.builders import Row
from tests.support.zoo import batch_of, model_of
from tests.support.zoo_models import ZOO

KNOWN = [name for name in ZOO if "videos" not in name and FAMILIES[name.split(",")[0]].grid is not None]
WITH_PROCESSOR = [name for name in KNOWN if hasattr(processors, name)]


def places_of(ids, wanted):
    places = np.flatnonzero(np.isin(ids, sorted(wanted)))
    return places, [len(list(run)) for _, run in groupby(places - np.arange(len(places)))]


def brighter(pixels, grid, cell):
    """The pixels with one cell of the grid a little brighter."""
    pixels, (row, column) = pixels.clone(), divmod(cell, grid.columns)
    if grid.pixels is None:  # patches in the order of the merged cells
        each = len(pixels) // (grid.rows * grid.columns)
        pixels[cell * each : (cell + 1) * each] += 0.05
        return pixels
    picture = pixels[grid.pixels]
    height, width = grid.size or picture.shape[-2:]
    rows = slice(row * height // grid.rows, (row + 1) * height // grid.rows)
    picture[:, rows, column * width // grid.columns : (column + 1) * width // grid.columns] += 0.05
    return pixels


@pytest.mark.parametrize("name", KNOWN)
def test_what_changes_in_a_cell_changes_its_token_most(name):
    model, batch = model_of(name), batch_of(name, [Row([3, "image", 3, -4])])
    places, runs = places_of(batch["input_ids"][0].numpy(), {ZOO[name].placeholder})
    (grid,) = family_of(model).grid(model.config, batch, runs, 1)
    assert grid.tokens == len(places)
    assert grid.rows * grid.columns > 1
    layer, _ = _layer_of(decoder_of(model), None, name)
    query = torch.tensor([batch["input_ids"].shape[1] - 2])

    def features(pixels):
        found = _looked_at(model, {**batch, "pixel_values": pixels}, layer, query, places)[1]
        return found[grid.first : grid.first + grid.rows * grid.columns]

    before, hits = features(batch["pixel_values"]), 0
    for cell in range(grid.rows * grid.columns):
        moved = (features(brighter(batch["pixel_values"], grid, cell)) - before).norm(dim=-1)
        hits += int(moved.argmax()) == cell
    # GOT's tower ends in convolutions with a stride, which see a border of the next cell
    assert hits >= grid.rows * grid.columns * (0.75 if name == "got_ocr2" else 1)


def quartered():
    """Bright at the upper left alone."""
    image = Image.new("RGB", (64, 64), (10, 10, 10))
    image.paste((250, 250, 250), (0, 0, 32, 32))
    return image


def expected_bright(rows, columns):
    return (np.arange(rows)[:, None] < rows / 2) & (np.arange(columns)[None] < columns / 2)


@pytest.mark.parametrize("name", WITH_PROCESSOR)
def test_the_grid_lies_over_the_picture(name):
    """With the family's processor, which may cut the image into tiles: what lies below the grid is the whole image."""
    processor = getattr(processors, name)()
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red one."}]
    batch = dict(VisionCollator(processor)([{"id": "a", "messages": chat, "images": [quartered()]}]))
    ids = batch["input_ids"][0].numpy()
    token = max(image_token_ids(processor)[1], key=lambda index: (ids == index).sum())
    places, runs = places_of(ids, {token})
    config = model_of(name).config
    (grid,) = FAMILIES[name].grid(config, batch, runs, 1)
    assert grid.tokens == len(places)
    if grid.pixels is None:
        cells = batch["pixel_values"].reshape(grid.rows * grid.columns, -1).mean(1).reshape(grid.rows, grid.columns)
        assert ((cells > cells.mean()).numpy() == expected_bright(grid.rows, grid.columns)).all()
        return
    picture = np.asarray(_picture(batch, grid, quartered(), processor).convert("L").resize((grid.columns, grid.rows)))
    assert ((picture > 128) == expected_bright(grid.rows, grid.columns)).all()
    assert picture.max() > 240, "the normalisation is taken back"
    assert picture.min() < 20


class Config:
    """Of a tower with 4 × 4 patches."""

    class vision_config:
        image_size, patch_size, spatial_merge_size = 32, 8, 2


def test_several_images_and_class_tokens():
    two = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    first, second = image_grids.square(Config, two, [16, 16], 2)
    assert (first.pixels, second.pixels) == ((0,), (1,))
    assert (first.tokens, second.first) == (16, 0)
    (with_class,) = image_grids.square(Config, {"pixel_values": torch.zeros(1, 3, 32, 32)}, [17], 1)
    assert (with_class.first, with_class.rows, with_class.tokens) == (1, 4, 17)
    tiles = image_grids.whole_last(Config, {"pixel_values": torch.zeros(4, 3, 32, 32)}, [48, 16], 2)
    assert [(grid.first, grid.pixels) for grid in tiles] == [(32, (2,)), (0, (3,))]
    next_two = image_grids.whole_first(Config, {"pixel_values": torch.zeros(2, 5, 3, 32, 32)}, [88, 24], 2)
    assert [(grid.first, grid.tokens, grid.pixels) for grid in next_two] == [(0, 88, (0, 0)), (0, 24, (1, 0))]
    sizes = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 8]])}
    assert [(grid.rows, grid.columns) for grid in image_grids.merged(Config, sizes, [6, 4], 2)] == [(2, 3), (1, 4)]


@pytest.mark.parametrize(
    ("grid", "shape", "runs", "told"),
    [
        (image_grids.square, (1, 3, 8, 8), [15], "15 tokens an image are no square"),
        (image_grids.square, (3, 3, 8, 8), [48], "3 pictures and 48 image tokens for 1 images: a picture was cut up"),
        (image_grids.whole_last, (2, 3, 8, 8), [31], "31 tokens of 2 pictures are no squares"),
        (image_grids.whole_first, (1, 5, 3, 8, 8), [8, 8], "2 runs of image tokens for 1 images"),
    ],
)
def test_tokens_that_form_no_grid(grid, shape, runs, told):
    with pytest.raises(ValueError, match=told):
        grid(Config, {"pixel_values": torch.zeros(shape)}, runs, 1)
