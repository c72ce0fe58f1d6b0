"""From Pillow images to both resolutions: MGM's own steps, done again one by one."""

import pytest
import torch
import transformers as T
from PIL import Image
from torch.nn import functional as F

from seecal import VisionCollator
from seecal.models.generate import reply
from seecal.models.loading import load_processor, load_vlm
from seecal.models.mgm import MGMConfig, MGMProcessor
from tests.support import processors
from tests.support.raw_data import records
from tests.support.zoo_models import mgm

MEAN, STD = (
    torch.tensor(one)[:, None, None]
    for one in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
)


def noise(width, height, seed=0):
    values = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.numpy())


def smaller(pixels, side):
    return F.interpolate(pixels[None], (side, side), mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64)])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("grid", [1, 2])
def test_both_resolutions_are_made_as_the_original_makes_them(size, padded, grid):
    processor = processors.mgm(grid)
    processor.image_processor.do_pad = padded
    side = 64 * grid
    image = noise(*size)
    made = processor(text=["<image>x"], images=[[image]], return_tensors="pt")
    large = made["pixel_values_aux"][0]
    assert large.shape == (3, side, side)
    if size == (64, 64) and grid == 1:  # no resizing: the pixels themselves
        own = torch.tensor(list(image.getdata())).view(64, 64, 3).permute(2, 0, 1)
        torch.testing.assert_close(large, (own / 255 - MEAN) / STD, atol=1e-5, rtol=0)
    low = smaller(large, 32 * grid)
    if grid == 1:
        torch.testing.assert_close(made["pixel_values"][0], low, atol=1e-6, rtol=0)
        return
    tiles = [low[:, :32, :32], low[:, :32, 32:], low[:, 32:, :32], low[:, 32:, 32:]]
    expected = torch.stack([*tiles, smaller(low, 32)])  # the whole picture is interpolated twice
    torch.testing.assert_close(made["pixel_values"][0], expected, atol=1e-6, rtol=0)


def test_pad_is_the_mean_colour_on_both_sides_and_square_cuts_the_middle():
    processor = processors.mgm()
    wide = Image.new("RGB", (64, 32), "white")
    padded = processor(text=["<image>"], images=[[wide]], return_tensors="pt")["pixel_values_aux"][0]
    colour = (torch.tensor([122, 116, 104])[:, None, None] / 255 - MEAN) / STD
    white = (torch.ones(3, 1, 1) - MEAN) / STD
    torch.testing.assert_close(padded[:, :14], colour.expand(3, 14, 64), atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[:, 18:46], white.expand(3, 28, 64), atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[:, -14:], colour.expand(3, 14, 64), atol=1e-5, rtol=0)
    processor.image_processor.do_pad = False
    halves = Image.new("RGB", (128, 32), "black")
    halves.paste("white", (48, 0, 80, 32))
    middle = processor(text=["<image>"], images=[[halves]], return_tensors="pt")["pixel_values_aux"][0]
    torch.testing.assert_close(middle[:, :, 3:-3], white.expand(3, 64, 58), atol=1e-5, rtol=0)


def test_each_image_is_as_many_tokens_as_the_model_makes_of_it():
    for grid in (1, 2):
        processor = processors.mgm(grid)
        config = MGMConfig(
            vision_config={"image_size": 32, "patch_size": 8},
            image_grid=grid,
            image_global=grid > 1,
            image_size_aux=64 * grid,
        )
        made = processor(text=["a<image>b<image>", "c"], images=[[noise(9, 9), noise(9, 7)], []], padding=True)
        ids = torch.tensor(made["input_ids"])
        assert (ids == processor.image_token_id).sum(1).tolist() == [2 * config.image_seq_length, 0]
        assert processor.image_seq_length == config.image_seq_length
        assert len(made["pixel_values"]) == len(made["pixel_values_aux"]) == 2
        assert set(made) == set(processor.model_input_names)


def test_texts_alone_have_no_pixels():
    assert set(processors.mgm()(text=["What?"], images=None)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("grid", [1, 2])
def test_saved_and_loaded_again(grid, tmp_path):
    processor = processors.mgm(grid)
    processor.save_pretrained(tmp_path)
    mgm().config.save_pretrained(tmp_path)
    loaded = load_processor(str(tmp_path))
    assert type(loaded) is MGMProcessor
    given = {"text": ["a<image>b"], "images": [[noise(40, 30)]], "return_tensors": "pt"}
    first, second = processor(**given), loaded(**given)
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert loaded.chat_template == processor.chat_template


def test_a_tokenizer_without_the_image_token_is_refused():
    made = processors.tokenizer(bos="<s>", eos="</s>")
    with pytest.raises(ValueError, match=r"no token '<image>'\. Add it"):
        MGMProcessor(T.LlavaImageProcessor(), made)


@pytest.mark.parametrize("grid", [1, 2])
def test_the_collator_gives_both_resolutions_and_both_without_content(grid):
    processor = processors.mgm(grid)
    rows = records("mgm")
    plain, blurred = VisionCollator(processor)(rows), VisionCollator(processor, contrast="blur", strength=4.0)(rows)
    alone = [processor(text=["<image>"], images=[[one]], return_tensors="pt") for row in rows for one in row["images"]]
    for name in ("pixel_values", "pixel_values_aux"):
        torch.testing.assert_close(plain[name], torch.cat([one[name] for one in alone]), atol=1e-6, rtol=0)
        assert torch.equal(blurred[name], plain[name])
        assert blurred[f"contrast_{name}"].shape == plain[name].shape
    images = (plain["input_ids"] == processor.image_token_id).sum(1) // processor.image_seq_length
    assert images.tolist() == [3, 1, 0]


def test_a_setting_of_the_image_processor_reaches_it():
    """``processor_kwargs: {do_pad: false}`` of a recipe is the original's stage 1."""
    collator = VisionCollator(processors.mgm(), processor_kwargs={"do_pad": False})
    assert collator.processor.image_processor.do_pad is False
    batch = collator([records("mgm")[1]])
    assert batch["pixel_values_aux"].shape == (1, 3, 64, 64)


def test_a_plain_processor_goes_on_with_tiles():
    sizes = {"size": {"shortest_edge": 128}, "crop_size": {"height": 128, "width": 128}}
    collator = VisionCollator(processors.mgm(), processor_kwargs={"image_grid": 2, "image_global": True, **sizes})
    found, expected = (one(records("mgm")) for one in (collator, VisionCollator(processors.mgm(2))))
    assert set(found) == set(expected)
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


def test_a_question_about_an_image_is_answered(tmp_path):
    """``seecal chat``, from a folder."""
    processor = processors.mgm()
    words = len(processor.tokenizer)
    text = T.LlamaConfig(
        vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = mgm(text)
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    noise(30, 20).save(tmp_path / "x.png")
    loaded, its_processor = load_vlm(str(tmp_path))
    pieces = []
    answer = reply(loaded, its_processor, tmp_path / "x.png", "What?", max_new_tokens=4, on_text=pieces.append)
    asked = processor(text=["USER: <image>\nWhat? ASSISTANT: "], images=[[noise(30, 20)]], return_tensors="pt")
    with torch.no_grad():
        ids = loaded.generate(**asked, max_new_tokens=4, do_sample=False)[0, asked["input_ids"].shape[1] :]
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert answer == "".join(pieces).strip() == expected != ""
