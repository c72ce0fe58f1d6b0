"""What a caption says is text, whatever it says."""

import pytest
from PIL import Image

from seecal import load_records


@pytest.mark.parametrize("key", ["text", "caption"])
@pytest.mark.parametrize("caption", ["A sign that says <image>.", "<image>", "<image> <image> on a wall"])
def test_a_mark_inside_a_caption_is_a_word_of_it(caption, key, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"file_name": "a.png", key: caption, "prompt": "What does it say?"}]
    (record,) = load_records(rows, image_root=tmp_path)
    user, answer = record["messages"]
    assert [part["text"] for part in answer["content"]] == [caption]
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][1]["text"] == "What does it say?"
    assert len(record["images"]) == 1
