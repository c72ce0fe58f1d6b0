"""What the collator saves on the way to a batch changes no bit of it, with any family's processor."""

import contextlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from seecal.data.collators import fast_tokenize as runs
from seecal.data.collators import vision as collator_module
from seecal.data.collators.vision import VisionCollator
from tests.families.test_raw_data import FAMILIES, processor_of, records
from tests.support.processors import llava

# Their processors call the tokenizer in another way, and get the whole rows tokenised.
AS_THEY_ARE = {"idefics3", "mllama", "paligemma", "ovis2"}


def jpeg(width, height):
    """A file of smooth colours."""
    values = np.random.default_rng(width).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_copies_of_pixels_and_short_runs_change_no_bit(family, monkeypatch):
    """JPEG files, large and small, against Pillow's decoder, the image processor and the tokenizer as they are."""
    files = [jpeg(48, 48), jpeg(90, 40), jpeg(333, 250)]
    chats = [
        {**one, "images": [files[(index + place) % 3] for place in range(len(one["images"]))]}
        for index, one in enumerate(records(family))
    ]
    collate = VisionCollator(processor_of(family))
    padded = []
    monkeypatch.setattr(runs, "_padded", lambda *args, real=runs._padded: (padded.append(1), real(*args))[1])
    found = collate(chats)
    assert bool(padded) == (family not in AS_THEY_ARE)
    assert collate._jpeg is not None
    collate._jpeg = None
    monkeypatch.setattr(collator_module, "fewer_copies", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(collator_module, "short_runs", lambda *_: contextlib.nullcontext())
    plain = collate(chats)
    assert sorted(found) == sorted(plain)
    for name, value in plain.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name


TEXTS = ["a <image>" + "<image>" * 4 + "\nb", "c", "<image><image> d e f"]


def image_id(processor):
    return processor.tokenizer.convert_tokens_to_ids("<image>")


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [True, False])
def test_it_pads_as_the_tokenizer_does(multiple, side, special):
    processor = llava()
    options = {"padding": True, "padding_side": side, "pad_to_multiple_of": multiple, "return_tensors": "pt"}
    plain = processor.tokenizer(TEXTS, add_special_tokens=special, **options)
    # Texts that were tokenised before, one of them in the other way
    known = {
        ("c", special): plain["input_ids"][1][plain["attention_mask"][1].bool()].tolist(),
        ("c", not special): [1, 2, 3],
    }
    with runs.short_runs(processor, [image_id(processor)], known):
        found = processor.tokenizer(TEXTS, add_special_tokens=special, **options)
    for name in ("input_ids", "attention_mask"):
        assert found[name].tolist() == plain[name].tolist(), name


def test_a_tokenizer_that_joins_image_tokens_is_left_alone():
    """The one assumption: an image token is cut out before all else. Here two of them are one token of another id."""
    processor = llava()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<image><image>"]})
    options = {"padding": True, "return_tensors": "pt"}
    expected = processor.tokenizer(TEXTS, **options)["input_ids"]
    with runs.short_runs(processor, [image_id(processor)]):
        found = processor.tokenizer(TEXTS, **options)["input_ids"]
    assert int((expected == image_id(processor)).sum()) == 1, "of seven, six are joined"
    assert found.tolist() == expected.tolist()
