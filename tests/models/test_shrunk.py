"""Small configurations keep what the image side depends on, and models of them run; processors that stand in fit them."""

import pytest
import torch
import transformers
from PIL import Image

from seecal.data.collators.vision import VisionCollator
from seecal.models.known import known_config, known_models
from seecal.models.loading import load_vlm
from seecal.models.shrunk import WIDTH, on_meta, random_model, shrunk
from seecal.models.stand_in import stand_in_processor

# Image tokens of a square picture of 700 pixels, as the published processors make them
TOKENS = {
    "llava-1.5-7b": 576,
    "llava-next-7b": 2928,
    "mgm-2b": 576,
    "mgm-hd-7b": 2880,
    "qwen3-vl-8b": 22 * 22,
    "internvl3-8b": 5
    * 256,  # 2 × 2 tiles, as 700² is more than half of 896² and less than half of 1344², and the whole
    "smolvlm-2.2b": 17 * 81,
    "paligemma2-3b": 256,
    "gemma3-4b": 256,
}
KEPT = ("image_size", "patch_size", "spatial_merge_size", "image_grid_pinpoints", "scale_factor", "mm_tokens_per_image")


def parts(config):
    return [config, *(getattr(config, name) for name in config.sub_configs)]


@pytest.mark.parametrize("name", known_models())
def test_small_and_of_the_same_class(name):
    real = known_config(name)
    before = real.to_dict()
    small = shrunk(real, vocabulary=400)
    assert type(small) is type(real)
    assert real.to_dict() == before
    assert small.get_text_config().hidden_size == WIDTH
    assert small.get_text_config().vocab_size == 400
    for one, other in zip(parts(real), parts(small), strict=True):
        for key in KEPT:
            assert getattr(one, key, None) == getattr(other, key, None)
    sizes = [sum(one.numel() for one in model.parameters()) for model in (random_model(small), on_meta(real))]
    assert sizes[0] < 1e6 < 1e9 < sizes[1]
    assert set(random_model(small).state_dict()) < set(on_meta(real).state_dict())


@pytest.mark.parametrize("name", TOKENS)
def test_image_tokens_are_those_of_the_real_model(name, tmp_path):
    """As many as the published processor makes, and the small model puts as many features in their place."""
    real = known_config(name)
    made = stand_in_processor(real)
    small = shrunk(real, vocabulary=len(made.processor.tokenizer), ids=made.ids)
    random_model(small).save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    model, processor = load_vlm(str(tmp_path))
    assert type(processor) is type(made.processor)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A square."}]}
    record = {"id": "a", "messages": [question, answer], "images": [Image.new("RGB", (700, 700))]}
    batch = dict(VisionCollator(processor)([record]))
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == TOKENS[name]
    known = {key: value for key, value in batch.items() if torch.is_tensor(value) and key != "long_records"}
    with torch.no_grad():
        assert model(**known).loss.isfinite()


def test_layers_of_every_kind_stay():
    text = shrunk(known_config("gemma3-4b")).text_config
    assert sorted(text.layer_types) == ["full_attention", "sliding_attention"]
    deep = shrunk(known_config("qwen3-vl-8b"))
    assert len(deep.vision_config.deepstack_visual_indexes) == 3
    assert deep.text_config.num_hidden_layers == 3, "each of the tower's three layers goes into one"
    assert sum(deep.text_config.rope_parameters["mrope_section"]) == deep.text_config.head_dim // 2


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen2_5_VL", "Mistral3", "Idefics3", "LlavaOnevision", "VipLlava"])
def test_other_families_shrink_too(family):
    small = shrunk(getattr(transformers, f"{family}Config")())
    assert sum(one.numel() for one in random_model(small).parameters()) < 2.5e7  # of which the vocabulary is most


def test_a_family_that_does_not_shrink_is_named():
    config = transformers.Gemma4Config()
    with pytest.raises(ValueError, match=r"Gemma4Config \(model_type 'gemma4'\) cannot be made small"):
        shrunk(config)


def test_no_processor_stands_in_for_a_family_without_a_row():
    with pytest.raises(ValueError, match="there is no processor for a mistral3 model here"):
        stand_in_processor(transformers.Mistral3Config())
