"""The tiles of LLaVA-NeXT: the same choice as the original's, because the list stands in another order."""

import numpy as np
from transformers.image_processing_utils import select_best_resolution

from seecal.models.assembly import grid_pinpoints
from tests.support.original_llava import select_best_resolution as of_the_original

# (width, height), CAL's llava/train/train.py
THEIRS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SIZES = np.random.default_rng(0).integers(20, 1500, (20_000, 2)).tolist()


def differing(pinpoints):
    """Of how many sizes (width, height) transformers takes another grid than the original."""
    chosen = [select_best_resolution((high, wide), pinpoints) for wide, high in SIZES]
    return [
        size for size, (high, wide) in zip(SIZES, chosen, strict=True) if of_the_original(size, THEIRS) != (wide, high)
    ]


def test_the_choice_is_the_originals():
    assert differing(grid_pinpoints(336)) == []


def test_the_same_numbers_read_the_other_way_round_choose_otherwise():
    other = differing(THEIRS)
    assert len(other) > 500
    assert all(max(size) <= 336 for size in other)


def test_the_list_grows_with_the_tower():
    assert grid_pinpoints(2 * 336) == [[2 * high, 2 * wide] for high, wide in grid_pinpoints(336)]
    assert sorted(map(tuple, grid_pinpoints(336))) == sorted((high, wide) for wide, high in THEIRS)
