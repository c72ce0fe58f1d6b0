"""Settings of a processor: checked against its own names, in force in the batch, and saved with it."""

import pytest
import transformers as hf

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
