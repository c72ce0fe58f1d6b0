"""Settings of a processor: checked against its own names, in force in the batch, and saved with it."""

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from seecal import CALConfig, VisionCollator
from seecal.data.collators.processors import configure
from tests.support import processors
from tests.support.sources import messages
from tests.support.tiny import tiny_image


def batch(processor, **options):
    record = {"messages": messages([("<image>a", "b")]), "images": [tiny_image("red", (96, 64))]}
    return VisionCollator(processor, **options)([record])


def patches(made):
    return made["pixel_values"].shape[0] if made["pixel_values"].dim() == 2 else made["pixel_values"].shape[1]


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("qwen2_5_vl", {"max_pixels": 256}),
        ("qwen3_vl", {"max_pixels": 256, "min_pixels": 64}),
        ("qwen2_vl", {"size": {"shortest_edge": 64, "longest_edge": 256}}),
        ("idefics3", {"do_image_splitting": False}),
        ("smolvlm", {"do_image_splitting": False}),
    ],
)
def test_fewer_image_tokens(tmp_path, family, kwargs):
    make = getattr(processors, family)
    as_it_is = batch(make())
    processor = make()
    changed = batch(processor, processor_kwargs=kwargs)
    assert changed["input_ids"].shape[1] < as_it_is["input_ids"].shape[1]
    assert patches(changed) < patches(as_it_is)
    assert int((changed["labels"] != -100).sum()) == int((as_it_is["labels"] != -100).sum())
    processor.save_pretrained(tmp_path)
    again = batch(type(processor).from_pretrained(tmp_path))
    assert again["input_ids"].tolist() == changed["input_ids"].tolist()
    assert patches(again) == patches(changed)


def test_a_size_of_a_fixed_kind():
    processor = configure(
        processors.llava(), {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
    )
    assert batch(processor)["pixel_values"].shape[-2:] == (16, 16)
    assert processor.patch_size == 8


def test_settings_of_the_processor_itself():
    processor = configure(processors.llava_onevision(), {"num_image_tokens": 9})
    assert processor.num_image_tokens == 9
    assert configure(processor, None) is processor
    assert configure(processor, {}) is processor


@pytest.mark.parametrize(
    ("family", "kwargs", "message"),
    [
        ("llava", {"max_pixels": 9}, "processor_kwargs: LlavaProcessor has no setting 'max_pixels'"),
        ("qwen2_5_vl", {"max_pixel": 9}, "has no setting 'max_pixel'. Did you mean max_pixels?"),
        ("idefics3", {"return_tensors": "np"}, "has no setting 'return_tensors'"),
        ("llava", {"size": "large"}, "processor_kwargs: CLIPImageProcessor does not take size='large'"),
    ],
)
def test_what_it_has_not(family, kwargs, message):
    with pytest.raises(ValueError, match=message):
        VisionCollator(getattr(processors, family)(), processor_kwargs=kwargs)


def test_the_config_takes_a_mapping_or_its_json(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    assert CALConfig(**options, processor_kwargs={"max_pixels": 9}).processor_kwargs == {"max_pixels": 9}
    parser = hf.HfArgumentParser(CALConfig)
    arguments = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--bf16",
        "false",
        "--processor_kwargs",
        '{"max_pixels": 9}',
    ]
    (config,) = parser.parse_args_into_dataclasses(args=arguments)
    assert config.processor_kwargs == {"max_pixels": 9}
    for bad in ("max_pixels", "[1]"):
        with pytest.raises(ValueError, match=r"processor_kwargs=.*expected a mapping in JSON"):
            CALConfig(**options, processor_kwargs=bad)


# ---- what resizes ----


def llava_processor(side=32):
    """LLaVA's own, as its start model has it."""
    images = hf.LlavaImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, do_pad=True, do_center_crop=True
    )
    processor = processors.llava()
    processor.image_processor = images
    return processor


def as_llava_has_it(image, side, pad):
    """What LLaVA's code makes of an image, in Pillow alone: "pad" or "square" (llava/mm_utils.py, CLIP's preprocessing)."""
    mean, std = np.array(hf.image_utils.OPENAI_CLIP_MEAN), np.array(hf.image_utils.OPENAI_CLIP_STD)
    width, height = image.size
    if pad and width != height:
        longer = max(width, height)
        square = Image.new("RGB", (longer, longer), tuple(int(x * 255) for x in mean))
        square.paste(image, ((longer - width) // 2, (longer - height) // 2))
        image, (width, height) = square, (longer, longer)
    shorter = min(width, height)
    image = image.resize((int(side * width / shorter), int(side * height / shorter)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side))) / 255
    return torch.tensor((pixels - mean) / std).permute(2, 0, 1).float()


def photo(size):
    """Noise at a coarse scale, so that resizing has something to smooth."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(96, 64), (50, 75), (33, 33)])
def test_pillow_resizes_as_the_original_does(size, pad):
    image = photo(size)
    record = {"messages": messages([("<image>a", "b")]), "images": [image]}
    found = {}
    for backend in ("pil", "torchvision"):
        collator = VisionCollator(llava_processor(), processor_kwargs={"do_pad": pad, "backend": backend})
        found[backend] = collator([record])["pixel_values"][0]
    expected = as_llava_has_it(image, 32, pad)
    torch.testing.assert_close(found["pil"], expected, atol=1e-6, rtol=0)
    if size == (50, 75):
        assert (found["torchvision"] - expected).abs().max() > 1e-3, "by a level of 256 in some pixels"


def test_what_resizes_is_chosen_anew_where_a_processor_is_loaded(tmp_path):
    processor = configure(llava_processor(), {"do_pad": False, "backend": "pil"})
    assert type(processor.image_processor).__name__ == "LlavaImageProcessorPil"
    assert configure(processor, {"backend": "pil"}).image_processor is processor.image_processor
    processor.save_pretrained(tmp_path)
    again = hf.AutoProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor) is hf.LlavaImageProcessor
    assert again.image_processor.do_pad is False
    assert type(configure(processor, {"backend": "torchvision"}).image_processor) is hf.LlavaImageProcessor


@pytest.mark.parametrize("backend", ["pillow", "PIL", 3])
def test_a_backend_that_is_none(backend):
    with pytest.raises(ValueError, match="expected one of torchvision, pil"):
        configure(llava_processor(), {"backend": backend})


def test_a_family_without_that_backend():
    class Odd(hf.LlavaImageProcessor):
        pass

    processor = llava_processor()
    processor.image_processor = Odd()
    with pytest.raises(ValueError, match=r"backend='pil': Odd has no such variant"):
        configure(processor, {"backend": "pil"})
