"""seecal.convert: tiny checkpoints of the original layout against its forward written out, and the way back."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

import seecal
from seecal.cli.main import app
from seecal.models.convert.configs import KEPT
from tests.support import original_llava as original

KINDS = ("llava", "llava_next")


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(kind, original's state, folder of the original, folder in transformers, what convert told)."""
    folder = tmp_path_factory.mktemp(request.param)
    state, _ = original.checkpoint(folder / "original", request.param)
    clip = original.clip_folder(folder / "clip")
    told = seecal.convert(folder / "original", folder / "hf", vision_tower=str(clip))
    return request.param, state, folder / "original", folder / "hf", told


def image(size):
    return Image.effect_noise(size, 90).convert("RGB")


def in_both(kind, folder, size):
    """(logits of transformers, the original's ids, tiles, size) for one question about an image of ``size``."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    processor = AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What colour?"}, {"type": "image"}]}]
    batch = processor(text=processor.apply_chat_template(chat), images=image(size), return_tensors="pt")
    pixels = batch["pixel_values"].double()
    batch["pixel_values"] = pixels
    with torch.no_grad():
        found = model(**batch).logits[0]
    ids, seen = [], False
    for one in batch["input_ids"][0].tolist():
        if one != model.config.image_token_id:
            ids.append(one)
        elif not seen:
            ids.append(-200)
            seen = True
    tiles = pixels[0] if kind == "llava_next" else pixels
    return found, ids, tiles, size if kind == "llava_next" else None


@pytest.mark.parametrize("size", [(40, 40), (90, 30), (31, 75), (64, 33)])
def test_logits_are_the_originals(made, size):
    kind, state, _, folder, _ = made
    found, ids, tiles, size = in_both(kind, folder, size)
    expected = original.logits(state, ids, tiles, size)
    rows = len(state["lm_head.weight"])
    torch.testing.assert_close(found[:, :rows], expected, atol=1e-6, rtol=0)
    assert found.shape[-1] % 64 == 0
    assert expected.abs().max() > 1


def test_back_bit_for_bit(made, tmp_path):
    _, state, source, folder, _ = made
    told = seecal.convert(folder, tmp_path / "back", to="original")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert told.model == "llava_llama"
    before, after = (json.loads((one / "config.json").read_text()) for one in (source, tmp_path / "back"))
    assert after["unfreeze_mm_vision_tower"] is True
    assert {name: after.get(name) for name in before} == before
    cut, whole = original.tokenizer(), AutoProcessor.from_pretrained(folder).tokenizer
    words = "What colour is it?</s>"
    assert AutoTokenizer.from_pretrained(tmp_path / "back")(words)["input_ids"] == cut(words)["input_ids"]
    assert len(whole) == len(cut) + 2


def test_a_model_that_was_never_the_originals_goes_back(made, tmp_path):
    """As llava-hf's: nothing kept of an original's config, the rows told by the tokenizer's added tokens."""
    kind, state, source, folder, _ = made
    shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config[KEPT]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"its vision tower is not openai/clip-vit-large-patch14-336.*--vision-tower"):
        seecal.convert(tmp_path / "hf", tmp_path / "back", to="original")
    told = seecal.convert(tmp_path / "hf", tmp_path / "back", to="original", vision_tower="authors/clip")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    before, after = (json.loads((one / "config.json").read_text()) for one in (source, tmp_path / "back"))
    same = set(before) - {"tokenizer_model_max_length", "architectures"}
    assert {name: after.get(name) for name in same} == {name: before[name] for name in same}
    assert told.model == "llava_llama"
    assert after["image_aspect_ratio"] == ("anyres" if kind == "llava_next" else "pad")


@pytest.mark.parametrize(("images", "pads"), [("square", False), ("pad", True)])
def test_how_images_become_squares_comes_from_the_config(images, pads, tmp_path):
    original.checkpoint(tmp_path / "original", "llava", image_aspect_ratio=images)
    clip = str(original.clip_folder(tmp_path / "clip"))
    seecal.convert(tmp_path / "original", tmp_path / "hf", vision_tower=clip)
    assert AutoProcessor.from_pretrained(tmp_path / "hf").image_processor.do_pad is pads
    seecal.convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["image_aspect_ratio"] == images


def test_a_tokenizer_of_llamas_class(tmp_path):
    """As the released checkpoints have it: tokenizer_class LlamaTokenizer, and tokenizer.model."""
    original.checkpoint(tmp_path / "original", "llava")
    path = tmp_path / "original" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer"}))
    (tmp_path / "original" / "tokenizer.model").write_bytes(b"sentencepiece")
    clip = str(original.clip_folder(tmp_path / "clip"))
    seecal.convert(tmp_path / "original", tmp_path / "hf", vision_tower=clip)
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "hf").tokenizer
    assert tokenizer("a<image>b</s>")["input_ids"].count(tokenizer.convert_tokens_to_ids("<image>")) == 1
    seecal.convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"sentencepiece"
    known = json.loads((tmp_path / "back" / "tokenizer.json").read_text())["added_tokens"]
    assert not {"<image>", "<pad>"} & {one["content"] for one in known}


def test_the_command(made, tmp_path):
    _, _, _, folder, _ = made
    done = CliRunner().invoke(
        app, ["convert", str(folder), str(tmp_path / "out"), "--to", "original"], catch_exceptions=False
    )
    assert re.search(r"out: llava_llama, \d+ tensors\n", done.output)
    assert "unfreeze_mm_vision_tower" in done.output
