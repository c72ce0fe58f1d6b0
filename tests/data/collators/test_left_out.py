"""A record that is left out takes no part: its row is a word without a label, and nothing else of it is looked at."""

import pytest
import torch

from seecal import VisionCollator
from tests.support.tiny import tiny_image, tiny_llava_processor


def record(answer, count):
    """With a weight for each token of its answer."""
    messages = [{"role": "user", "content": "What colour is it?"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [tiny_image("red")], "weights": [float(i + 1) for i in range(count)]}


@pytest.mark.parametrize("settings", [{"on_long": "drop"}, {"on_bad": "skip"}], ids=["too long", "no answer"])
def test_the_weights_of_a_record_that_is_left_out_are_not_looked_at(settings):
    processor = tiny_llava_processor()
    alone = VisionCollator(processor)([{**record("It is red.", 0), "weights": None}])
    labels = int((alone["labels"] != -100).sum())
    good = record("It is red.", labels)
    long = "on_long" in settings
    bad = record("It is red." * 30 if long else "", 3)
    limit = int(alone["attention_mask"].sum()) if long else None
    batch = VisionCollator(processor, max_length=limit, **settings)([bad, good])
    assert (batch["labels"][0] == -100).all()
    assert not batch["token_weights"][0].any()
    assert batch["token_weights"][1][batch["labels"][1] != -100].tolist() == good["weights"]
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    assert batch["long_records"].tolist() == [1, 0]
