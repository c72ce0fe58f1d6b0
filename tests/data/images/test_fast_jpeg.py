"""Fewer copies, the same bits; and decoding at a reduced scale, which never makes an image smaller than it is needed."""

import contextlib
import io
import pickle

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from seecal import CALConfig
from seecal.data.collators import vision as collator_module
from seecal.data.collators.fast_tokenize import short_runs
from seecal.data.collators.vision import VisionCollator
from seecal.data.images import fast_jpeg as pixels
from seecal.data.images.decode import decode_image, open_image
from seecal.data.images.fast_jpeg import fewer_copies, jpeg_pixels
from seecal.data.images.reduced_jpeg import box_for
from tests.support.tiny import tiny_llava_processor

KINDS = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "progressive": {"progressive": True},
    "coarse": {"quality": 20},
    "RGB": {"keep_rgb": True, "subsampling": "4:4:4"},
}


def photo(width=200, height=151, mode="RGB"):
    """Smooth, and a little grain: what JPEG is made for."""
    generator = np.random.default_rng(width)
    smooth = Image.fromarray(generator.integers(40, 216, (5, 6, 3), dtype=np.uint8)).resize((width, height), 3)
    grain = generator.normal(0, 3, (height, width, 1))
    return Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def record(*images):
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": "What colour is it?"}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "It is red."}],
        "images": list(images),
    }


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_file_becomes_the_pixels_that_pillow_gives(kind, mode):
    if kind == "RGB" and mode == "L":
        mode = "RGB"
    for size in ((200, 151), (17, 16), (1, 1)):
        data = jpeg(photo(*size, mode), **KINDS[kind])
        found = decode_image(data, "r", jpeg=jpeg_pixels)
        assert isinstance(found, torch.Tensor)
        assert torch.equal(found, as_tensor(decode_image(data, "r")))


def test_what_needs_pillow_still_gets_it():
    sideways = Image.Exif()
    sideways[0x0112] = 6
    for data in (jpeg(photo(), exif=sideways), jpeg(photo(mode="CMYK"))):
        assert isinstance(decode_image(data, "r", jpeg=jpeg_pixels), Image.Image)
    assert decode_image(jpeg(photo(), exif=sideways), "r", jpeg=jpeg_pixels).size == (151, 200)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_damaged_file_is_refused_as_before(share):
    data = jpeg(photo())
    with pytest.raises(ValueError, match="damaged or cut off"):
        decode_image(data[: int(len(data) * share)], "r", jpeg=jpeg_pixels)


def test_a_decoder_with_other_pixels_is_not_used(monkeypatch, caplog):
    pixels.decoders_agree.cache_clear()
    assert pixels.decoders_agree()
    plain = pixels.decode_jpeg
    monkeypatch.setattr(pixels, "decode_jpeg", lambda *args, **kwargs: plain(*args, **kwargs) ^ 1)
    pixels.decoders_agree.cache_clear()
    assert jpeg_pixels(jpeg(photo())) is None
    assert "Pillow decodes them" in caplog.text
    pixels.decoders_agree.cache_clear()


def test_a_file_that_needs_no_turning_is_not_copied_and_stays_usable():
    image = Image.open(io.BytesIO(jpeg(photo())))
    assert decode_image(image, "r") is image


def test_the_image_processor_is_left_as_it_was():
    processor = tiny_llava_processor().image_processor
    before = dict(vars(processor))
    with fewer_copies(processor):
        assert vars(processor) != before
    assert vars(processor) == before
    with pytest.raises(ValueError, match="image"), fewer_copies(processor):
        processor("no image")
    assert vars(processor) == before


def test_pillow_images_arrays_and_tensors_still_go_in():
    image = photo(48, 40)
    processor = tiny_llava_processor().image_processor
    expected = processor([image], return_tensors="pt")["pixel_values"]
    same = [image, np.array(image), as_tensor(image).contiguous(), as_tensor(image), image.convert("RGBA")]
    with fewer_copies(processor):
        for one in same:
            assert torch.equal(processor([one], return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("contrast", [None, "patch_mask"])
def test_the_batch_is_the_same_to_the_bit(monkeypatch, contrast):
    records = [record(jpeg(photo(90, 70))), record(jpeg(photo(70, 90, "L"))), record(photo(33, 32))]
    collate = VisionCollator(tiny_llava_processor(), contrast=contrast, strength=0.5)
    found = collate(records)
    monkeypatch.setattr(collator_module, "fewer_copies", lambda _: contextlib.nullcontext())
    collate._jpeg = None
    plain = collate(records)
    assert sorted(found) == sorted(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert found["pixel_values"].stride() == plain["pixel_values"].stride()


# ---- Reduced ----


@pytest.mark.parametrize(
    ("size", "at_least", "expected"),
    [
        ((400, 300), (100, 75), (100, 75)),
        ((400, 300), (101, 75), (200, 150)),
        ((400, 300), (201, 10), (400, 300)),
        ((401, 301), (50, 37), (51, 38)),
        ((400, 300), (1, 1), (50, 38)),
        ((400, 300), (500, 500), (400, 300)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_is_enough(tmp_path, size, at_least, expected):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(photo(*size)))
    assert open_image(path, at_least=at_least).size == expected
    assert open_image(path).size == size


def test_the_box_is_that_of_the_upright_image():
    sideways = Image.Exif()
    sideways[0x0112] = 6
    asked = []
    data = jpeg(photo(400, 200), exif=sideways)
    image = decode_image(data, "r", at_least=lambda size: asked.append(size) or (50, 100))
    assert asked == [(200, 400)]
    assert image.size == (50, 100)


def test_other_formats_are_decoded_in_full():
    file = io.BytesIO()
    photo().save(file, "PNG")
    assert decode_image(file.getvalue(), "r", at_least=(10, 10)).size == (200, 151)


def test_the_limit_is_that_of_the_full_size():
    with pytest.raises(ValueError, match="200 × 151 pixels are over the limit"):
        decode_image(jpeg(photo()), "r", at_least=(10, 10), max_pixels=10_000)


TILES = [[64, 64], [128, 64], [64, 128], [128, 128]]
SIDE = {"height": 64, "width": 64}
PROCESSORS = {
    "clip": lambda: hf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=SIDE),
    "siglip": lambda: hf.SiglipImageProcessor(size=SIDE),
    "gemma3": lambda: hf.Gemma3ImageProcessor(size=SIDE),
    "pixtral": lambda: hf.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16}),
    "qwen2_vl": lambda: hf.Qwen2VLImageProcessor(min_pixels=256, max_pixels=64 * 64, patch_size=8, merge_size=2),
    "llava_next": lambda: hf.LlavaNextImageProcessor(
        size={"shortest_edge": 64}, crop_size=SIDE, image_grid_pinpoints=TILES
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionImageProcessor(size=SIDE, image_grid_pinpoints=TILES),
    "got_ocr2": lambda: hf.GotOcr2ImageProcessor(size=SIDE, crop_to_patches=True, max_patches=4),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_every_resize_of_a_reduced_image_makes_it_smaller_and_the_shapes_stay(monkeypatch, name):
    """The sizes that the processor really resizes to, watched, against those that the table says."""
    processor, resized = PROCESSORS[name](), []
    box, reduced = box_for(processor), 0
    plain = type(processor).resize

    def watched(self, *args, **kwargs):
        image = kwargs.get("images", kwargs.get("image", args[0] if args else None))
        out = plain(self, *args, **kwargs)
        resized.append((tuple(image.shape[-2:]), tuple(out.shape[-2:])))
        return out

    for size in ((1600, 1200), (1200, 1601), (999, 999), (402, 131), (77, 300), (250, 160), (48, 48)):
        data = jpeg(photo(*size))
        full, small = decode_image(data, "r"), decode_image(data, "r", at_least=box)
        expected = processor([full], return_tensors="pt")
        with monkeypatch.context() as patched:
            patched.setattr(type(processor), "resize", watched)
            resized.clear()
            found = processor([small], return_tensors="pt")
        assert found["pixel_values"].shape == expected["pixel_values"].shape
        for key in ("image_grid_thw", "num_patches"):
            assert (key in found) == (key in expected)
            assert key not in found or torch.as_tensor(found[key]).equal(torch.as_tensor(expected[key]))
        if small.size != full.size:
            reduced += 1
            assert resized
            assert all(after[0] <= before[0] and after[1] <= before[1] for before, after in resized)
            error = (found["pixel_values"] - expected["pixel_values"]).abs()
            assert 0 < error.mean() < 0.1  # in standard deviations of the pixels
        else:
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert reduced >= 2, "nothing was tested"


def test_a_collator_goes_to_a_spawned_worker():
    collate = pickle.loads(pickle.dumps(VisionCollator(tiny_llava_processor(), decoding="reduced")))
    assert collate._at_least((4000, 3000)) == VisionCollator(tiny_llava_processor(), decoding="reduced")._at_least(
        (4000, 3000)
    )
    assert collate._at_least((4000, 3000)) is not None


def test_a_processor_that_is_not_known_decodes_in_full_and_says_so(caplog):
    assert box_for(hf.Idefics3ImageProcessor()) is None
    assert "Idefics3ImageProcessor resizes to are not known" in caplog.text


def test_the_collator_reduces_only_when_told_to():
    images = {}
    for decoding in ("exact", "reduced"):
        collate = VisionCollator(tiny_llava_processor(), decoding=decoding)
        (images[decoding],) = collate._conversation(record(jpeg(photo(320, 256))), "a").images
    assert images["exact"].shape == (3, 256, 320)
    assert images["reduced"].size == (40, 32)


def test_contrasts_that_count_in_pixels_are_refused_with_it():
    for contrast in ("blur", "noise"):
        with pytest.raises(ValueError, match=f"image_decoding='reduced' with contrast='{contrast}'"):
            CALConfig("x", contrast=contrast, image_decoding="reduced", use_cpu=True, report_to="none")
        with pytest.raises(ValueError, match="pixels of the full image"):
            VisionCollator(tiny_llava_processor(), contrast=contrast, strength=1.0, decoding="reduced")
    assert CALConfig("x", contrast="swap", image_decoding="reduced", use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="image_decoding='half'"):
        CALConfig("x", image_decoding="half", use_cpu=True, report_to="none")


# ---- Runs of image tokens ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_runs_of_image_tokens_become_the_same_ids(side):
    processor = tiny_llava_processor()
    tokenizer, token = processor.tokenizer, "<image>"
    options = {"padding": True, "padding_side": side, "pad_to_multiple_of": 8, "return_tensors": "pt"}
    texts = [f"What{token * 50} colour?\n{token}{token}b", "It is red.", token * 7, f" {token * 3} {token} "]
    expected = tokenizer(texts, **options)
    with short_runs(processor, [tokenizer.convert_tokens_to_ids(token)]):
        assert processor.tokenizer is not tokenizer
        found = processor.tokenizer(texts, **options)
    assert processor.tokenizer is tokenizer
    assert all(torch.equal(found[name], expected[name]) for name in ("input_ids", "attention_mask"))


def test_a_tokenizer_that_reads_runs_otherwise_is_used_as_it_is():
    processor = tiny_llava_processor()
    ids = [processor.tokenizer.convert_tokens_to_ids("<image>")]
    with short_runs(processor, ids):
        assert type(processor.tokenizer).__name__ == "_ShortRuns"
    processor.tokenizer.__class__ = type("Odd", (type(processor.tokenizer),), {"__call__": _merging})
    with short_runs(processor, ids):
        assert type(processor.tokenizer).__name__ == "Odd"


def _merging(self, text, **options):
    """Reads three images in a row as two."""
    text = text.replace("<image>" * 3, "<image>" * 2)
    return hf.PreTrainedTokenizerFast.__call__(self, text, **options)
