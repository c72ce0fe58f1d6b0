"""The data options: their choices, their defaults beside the collators', and that they need no torch."""

import dataclasses
import subprocess
import sys

import pytest

from seecal import CALConfig, VisionCollator
from seecal.data.collators.checked import CheckedCollator
from seecal.data.options import DECODINGS, ON_BAD, ON_LONG, DataOptions, check_decoding
from tests.support.processes import environment, limit
from tests.support.tiny import tiny_llava_processor


@pytest.mark.parametrize(
    ("bad", "choices"),
    [({"on_long": "cut"}, ON_LONG), ({"on_bad": "drop"}, ON_BAD), ({"image_decoding": "half"}, DECODINGS)],
)
def test_a_value_that_is_none_of_the_choices_is_named_everywhere(tmp_path, bad, choices):
    ((name, value),) = bad.items()
    message = f"{name}='{value}': expected one of {', '.join(choices)}"
    with pytest.raises(ValueError, match=message):
        DataOptions(**bad)
    with pytest.raises(ValueError, match=message):
        CALConfig(str(tmp_path), use_cpu=True, bf16=False, **bad)
    field = "decoding" if name == "image_decoding" else name
    with pytest.raises(ValueError, match=message):
        VisionCollator(tiny_llava_processor(), **{field: value})
    if name != "image_decoding":
        with pytest.raises(ValueError, match=message):
            CheckedCollator(list, None, frozenset(), **bad)


def test_a_config_has_the_same_fields_with_the_same_defaults_and_help(tmp_path):
    config = {field.name: field for field in dataclasses.fields(CALConfig)}
    for field in dataclasses.fields(DataOptions):
        assert config[field.name].default == field.default
        assert config[field.name].metadata["help"] == field.metadata["help"]
    made = CALConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert DataOptions() == DataOptions(made.on_long, made.on_bad, made.image_decoding) == DataOptions("truncate")
    assert VisionCollator(tiny_llava_processor()).on_long == "error", "by hand it stays strict"


def test_strengths_in_pixels_need_all_of_them():
    for contrast in ("blur", "noise"):
        with pytest.raises(ValueError, match=f"image_decoding='reduced' with contrast='{contrast}'"):
            check_decoding("reduced", contrast)
        check_decoding("exact", contrast)
    for contrast in (None, "drop", "swap", "patch_mask"):
        check_decoding("reduced", contrast)


def test_they_are_read_without_torch():
    code = "import sys, seecal.data.options; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), timeout=limit(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
