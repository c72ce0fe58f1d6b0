"""Ids that are followed from a text into what the processor made of it: only images may have come in between."""

import pytest

from seecal.data.collators.image_tokens import TextIds, expanded_positions
from seecal.data.collators.processors import processed
from tests.support import processors
from tests.support.tiny import tiny_image

IMAGE, PLACE = 5, 4


@pytest.mark.parametrize(
    ("ids", "places", "expanded", "expected"),
    [
        ([1, PLACE, 2], [1], [1, IMAGE, IMAGE, 2], [0, None, 3]),
        ([1, PLACE, 2], [1], [1, 9, 9, 2], None),  # something else was inserted where an image is due
        ([1, 2], [], [1, 2, 3], None),  # something follows
        ([1, 2], [], [1, IMAGE, 2], None),  # an image where none is due
        ([1, 2], [], [1, 2], [0, 1]),
    ],
)
def test_only_images_come_in_between(ids, places, expanded, expected):
    text = TextIds(ids, places, [False] * len(ids))
    assert expanded_positions(text, expanded, frozenset({IMAGE})) == expected


def test_mllamas_shorter_rows_end_in_padding():
    processor = processors.mllama()
    pad = processor.tokenizer.pad_token_id
    texts = ["<|image|>a", "a much longer text, and no image to it"]
    batch = processed(processor, texts, [[tiny_image("red")], []], prefixes=[0, 0], add_special_tokens=False)
    padding = batch["attention_mask"] == 0
    assert pad != 0
    assert padding[0].any()
    assert (batch["input_ids"][padding] == pad).all()
