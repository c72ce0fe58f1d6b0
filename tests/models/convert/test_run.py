"""seecal.convert: tiny checkpoints of the original layout against its forward written out, and the way back."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import seecal
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
