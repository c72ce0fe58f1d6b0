"""What is set on a collator reaches data loader workers that run already, and what one of them said no other says again."""

import logging
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from seecal import VisionCollator
from seecal.data.collators.shared import SharedInt
from tests.support.tiny import tiny_image, tiny_llava_processor


class Counter:
    steps = SharedInt(3)


def test_each_object_has_its_own_number():
    assert Counter.steps == 3, "the default, for dataclasses"
    one, other = Counter(), Counter()
    one.steps, other.steps = 1, 2
    assert (one.steps, other.steps) == (1, 2)
    one.steps += 4
    copy = pickle.loads(pickle.dumps(one))
    copy.steps = 9
    assert (one.steps, copy.steps) == (5, 9)
    assert vars(copy)["_shared_steps"].is_shared()


def records(count):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is red. It is red."}]
    return [{"id": f"r{index}", "messages": messages, "images": [tiny_image("red")]} for index in range(count)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_epoch_reaches_persistent_workers(workers):
    collator = VisionCollator(tiny_llava_processor(), contrast="noise", strength=0.5)
    loader = DataLoader(
        records(4), batch_size=2, collate_fn=collator, num_workers=workers, persistent_workers=workers > 0
    )
    seen = {}
    for epoch in (0, 1, 0):
        collator.epoch = epoch
        pixels = torch.cat([batch["contrast_pixel_values"] for batch in loader])
        assert torch.equal(seen.setdefault(epoch, pixels), pixels)
    assert not torch.equal(seen[0], seen[1])
    collator.epoch = 1
    assert torch.equal(collator(records(2))["contrast_pixel_values"], seen[1][:2])


def test_workers_say_it_once_together(tmp_path):
    """Each has a logger of its own, so they are told apart by a file."""
    collator = VisionCollator(tiny_llava_processor(), max_length=30, on_long="truncate")
    handler = logging.FileHandler(tmp_path / "log")
    logger = logging.getLogger("seecal")
    logger.addHandler(handler)
    try:
        settings = {"batch_size": 1, "collate_fn": collator, "num_workers": 1}
        loader = DataLoader(records(8), persistent_workers=True, **settings)
        batches = [*loader, *loader, *DataLoader(records(8), **settings)]
    finally:
        logger.removeHandler(handler)
        handler.close()
    assert [batch["long_records"].tolist() for batch in batches] == [[0, 1]] * 24
    assert (tmp_path / "log").read_text().count("is cut from") == 1
    assert "record 'r0' is cut from " in (tmp_path / "log").read_text()
