"""Configs of published models that come with seecal: as large as published, found by name, by hub id and in a folder."""

import pytest
import torch

from seecal.models.known import known_config, known_image_processor, known_model, known_models
from seecal.planning.storageless import storageless_model

# keras_hub counts PaliGemma 2 with 257,152 words; transformers pads the table to 257,216 rows of 2,304
PADDING = {"paligemma2-3b": 64 * 2304}
MGM = [name for name in known_models() if name.startswith("mgm")]
OTHERS = [name for name in known_models() if name not in MGM]


def parameters(name):
    return sum(one.numel() for one in storageless_model(known_config(name), torch.bfloat16).parameters())


@pytest.mark.parametrize("name", [name for name, model in known_models().items() if model.parameters])
def test_as_many_numbers_as_published(name):
    assert parameters(name) == known_models()[name].parameters + PADDING.get(name, 0)


def test_models_without_a_published_total_are_the_sum_of_their_parts():
    """From the tables of the LLaMA and CLIP papers: 13.0 B of the language model, 0.30 B of the tower, the projector."""
    words = (32_064 - 32_000) * 2 * 5120
    projector = 1024 * 5120 + 5120 + 5120 * 5120 + 5120
    assert parameters("llava-1.5-13b") == 13_015_864_320 + 303_507_456 + projector + words
    assert parameters("llava-next-13b") == parameters("llava-1.5-13b") + 5120  # image_newline
    assert parameters("llava-next-7b") == parameters("llava-1.5-7b") + 4096
    # Qwen2.5-7B's own 7,615,616,512 with 390 rows less in each of two tables of words; InternViT-300M's 304 M; the MLP
    tower_and_mlp = parameters("internvl3-8b") - (7_615_616_512 - 2 * 390 * 3584)
    assert tower_and_mlp == pytest.approx(304e6 + 4096 * 3584 + 3584**2, rel=0.002)


def test_every_model_says_where_it_is_from_and_what_it_stands_for():
    seen = [hub_id for model in known_models().values() for hub_id in model.ids]
    assert len(seen) == len(set(seen)) >= len(known_models()) == 14
    for model in known_models().values():
        assert len(model.source) > 40
        assert (model.parameters is None) == (model.parameters_source is None)


def test_a_hub_id_a_folder_and_a_name_are_the_same_model(tmp_path):
    named = known_config("llava-1.5-7b")
    assert known_config("LLaVA-HF/llava-1.5-7b-hf").to_dict() == named.to_dict()
    named.save_pretrained(tmp_path)
    own = {"_name_or_path"}
    read = known_config(str(tmp_path)).to_dict()
    assert {key: value for key, value in read.items() if key not in own} == {
        key: value for key, value in named.to_dict().items() if key not in own
    }


def test_each_call_gives_a_config_of_its_own():
    known_config("qwen3-vl-8b").text_config.hidden_size = 8
    assert known_config("qwen3-vl-8b").text_config.hidden_size == 4096
    assert known_model("qwen3-vl-8b").config["text_config"]["hidden_size"] == 4096


@pytest.mark.parametrize("name", ["llava-2-7b", "nobody/nothing", "/no/such/folder"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"{name}: no folder .*gemma3-4b, internvl3-8b, llava-1.5-13b"):
        known_config(name)


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read"):
        known_config(str(tmp_path))


def test_image_processors_cut_a_picture_as_the_published_ones_do():
    from PIL import Image

    picture = Image.new("RGB", (640, 480), "grey")

    def shape(name):
        made = known_image_processor(name)(images=[picture], return_tensors="pt")
        return tuple(made["pixel_values"].shape)

    assert shape("llava-next-7b") == (1, 5, 3, 336, 336)  # two by two tiles and the whole
    assert shape("qwen3-vl-8b") == (40 * 30, 3 * 2 * 16 * 16)
    assert shape("internvl3-8b") == (13, 3, 448, 448)  # four by three and the whole
    assert shape("smolvlm-2.2b") == (1, 13, 3, 384, 384)
    assert known_image_processor("llava-1.5-7b") is None
