"""VisionCollator on the processors of other families: tiles, row breaks, wrapper tokens, text-only rows in between."""

import contextlib
import io

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from seecal.data import collator as collator_module
from seecal.data.collator import VisionCollator
from tests.tiny import PLAIN_TEMPLATE, tiny_image, tiny_tokenizer

SIZE = {"height": 32, "width": 32}
TILES = [[32, 32], [64, 32], [64, 64]]


def tokenizer(*special, **names):
    made = tiny_tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<image>", "<|start|>", *special]})
    made.chat_template = None
    for name, token in names.items():  # processors read them off the tokenizer
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


def llava_next():
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=TILES)
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": 8}
    return hf.LlavaNextProcessor(images, tokenizer(), chat_template=PLAIN_TEMPLATE, **settings)


def llava_onevision():
    images = hf.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=TILES)
    videos, settings = hf.LlavaOnevisionVideoProcessor(size=SIZE), {"vision_feature_select_strategy": "full"}
    made = tokenizer("<video>")
    return hf.LlavaOnevisionProcessor(
        images, made, videos, num_image_tokens=16, chat_template=PLAIN_TEMPLATE, **settings
    )


def qwen2_vl():
    images = hf.Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    made = tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    template = PLAIN_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    return hf.Qwen2VLProcessor(
        images, made, hf.Qwen2VLVideoProcessor(patch_size=8, merge_size=2), chat_template=template
    )


def idefics3():
    images = hf.Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    made = tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles)
    return hf.Idefics3Processor(images, made, image_seq_len=16, chat_template=PLAIN_TEMPLATE)


def pixtral():
    images = hf.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})
    made = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return hf.PixtralProcessor(images, made, patch_size=8, chat_template=PLAIN_TEMPLATE.replace("<image>", "[IMG]"))


def internvl():
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    made = tokenizer(*names.values(), "<video>", **names, video_token="<video>")
    template, videos = PLAIN_TEMPLATE.replace("<image>", "<IMG_CONTEXT>"), hf.InternVLVideoProcessor(size=SIZE)
    images = hf.GotOcr2ImageProcessor(size=SIZE)
    return hf.InternVLProcessor(images, made, videos, image_seq_length=16, chat_template=template)


def gemma3():
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    template = PLAIN_TEMPLATE.replace("<image>", "<start_of_image>")
    images = hf.Gemma3ImageProcessor(size=SIZE)
    return hf.Gemma3Processor(images, tokenizer(*names.values(), **names), image_seq_length=16, chat_template=template)


FAMILIES = [llava_next, llava_onevision, qwen2_vl, idefics3, pixtral, internvl, gemma3]


def image():
    return {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def records():
    several = [
        {"role": "user", "content": [image(), text("What"), image(), text("b")]},
        {"role": "assistant", "content": "It is red."},
        {"role": "user", "content": [image(), text("b")]},
        {"role": "assistant", "content": "It is."},
    ]
    images = [tiny_image("red", (48, 48)), tiny_image("blue", (90, 40)), tiny_image("green")]
    chats = [{"messages": several, "images": images}]
    for answer, shown in (("It is not.", []), ("It is a.", [tiny_image("red")])):
        turns = [{"role": "user", "content": "b"}, {"role": "assistant", "content": answer}]
        chats.append({"messages": turns, "images": shown})
    return chats


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.__name__)
def test_labels_are_the_answers_and_their_ends(family):
    collator = VisionCollator(family())
    batch = collator(records())
    decoded = [collator.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert decoded == ["It is red.<|end|>It is.<|end|>", "It is not.<|end|>", "It is a.<|end|>"]
    alone = collator(records()[1:2])
    assert (alone["labels"] != -100).sum() == (batch["labels"][1] != -100).sum()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.__name__)
def test_fewer_copies_of_pixels_change_no_bit_of_the_batch(family, monkeypatch):
    """JPEG files, large and small, against Pillow's decoder and the image processor as it is."""
    pictures = []
    for width, height in ((48, 48), (90, 40), (333, 250)):
        values = np.random.default_rng(width).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG")
        pictures.append(file.getvalue())
    chats = [{**records()[0], "images": pictures}, records()[1], {**records()[2], "images": pictures[2:]}]
    collate = VisionCollator(family())
    found = collate(chats)
    assert collate._jpeg is not None
    collate._jpeg = None
    monkeypatch.setattr(collator_module, "fewer_copies", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(collator_module, "short_runs", lambda *_: contextlib.nullcontext())
    plain = collate(chats)
    assert sorted(found) == sorted(plain)
    for name, value in plain.items():
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value)), name
