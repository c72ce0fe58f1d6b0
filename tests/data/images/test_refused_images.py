"""What an image file, a contrast or a processor that pads must not do in silence."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image, ImageFile

from seecal import CONTRASTS, Contrast
from seecal.data.images.decode import open_image
from seecal.data.images.fast_jpeg import fewer_copies
from seecal.data.images.perturbations import contrast_images


def test_sixteen_bit_grey_is_scaled_by_its_largest_value(tmp_path):
    """255 steps of 257, so that 65,535 and nothing less is white."""
    for value, expected in ((65_535, 255), (65_280, 254), (33_024, 128)):
        Image.fromarray(np.full((1, 1), value, dtype=np.uint16)).save(tmp_path / "grey.png")
        assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (expected,) * 3


def test_damaged_images_do_not_pass_because_somebody_allowed_it(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "whole.png")
    assert open_image(tmp_path / "whole.png").size == (4, 4)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is on: damaged images would pass unseen"):
        open_image(tmp_path / "whole.png")


def test_a_contrast_of_ones_own_must_keep_the_size(monkeypatch):
    """Another size would be another number of image tokens."""

    def half(image, strength, rng, others):
        return image.resize((image.width // 2, image.height))

    monkeypatch.setitem(CONTRASTS, "half", Contrast("half", on_pixels=True, strength=1.0, function=half))
    with pytest.raises(ValueError, match=r"record 'a': contrast='half' made an image of \(4, 8\) from one of \(8, 8\)"):
        contrast_images([[Image.new("RGB", (8, 8))]], ["record 'a'"], "half", 1.0, 0)


def test_what_is_padded_is_padded_with_zeros_after_it_was_normalised():
    sizes = {"size": {"height": 32, "width": 48}, "pad_size": {"height": 64, "width": 64}}
    processor = hf.CLIPImageProcessor(**sizes, do_center_crop=False, do_pad=True)
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    plain = processor(images, return_tensors="pt")["pixel_values"]
    with fewer_copies(processor):
        found = processor(images, return_tensors="pt")["pixel_values"]
    assert not plain[:, :, 60, 60].any(), "the corner is padding"
    assert torch.equal(found, plain)
