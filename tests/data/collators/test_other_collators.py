"""What CheckedCollator adds to another collator's batches that knows nothing of it: each rule where only it can do it."""

import pytest
import torch

from seecal import VisionCollator
from seecal.data.collators.checked import CheckedCollator
from seecal.data.collators.max_length import LengthLimit
from tests.support.tiny import tiny_llava_processor, tiny_records

PROCESSOR = tiny_llava_processor()
IMAGE = PROCESSOR.tokenizer.convert_tokens_to_ids("<image>")


def learns_everything(records):
    """As a text collator would: every token that is no padding is a label, and weights are not looked at."""
    batch = VisionCollator(PROCESSOR)([{**record, "weights": None} for record in records])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def without_labels_of(name):
    def collate(records):
        batch = VisionCollator(PROCESSOR)(records)
        for row, record in enumerate(records):
            if record["id"] == name:
                batch["labels"][row] = -100
        return batch

    return collate


def checked(collator, max_length=None, **settings):
    return CheckedCollator(collator, max_length, frozenset({IMAGE}), **settings)


def test_image_tokens_are_never_labels():
    batch = checked(learns_everything)(tiny_records(3))
    images = batch["input_ids"] == IMAGE
    assert images.any()
    assert (batch["labels"][images] == -100).all()
    assert torch.equal(batch["labels"][~images], learns_everything(tiny_records(3))["labels"][~images])


def test_weights_come_from_the_records():
    records = tiny_records(2)
    for record, labels in zip(records, checked(learns_everything)(records)["labels"], strict=True):
        record["weights"] = [1.0 + n for n in range(int((labels != -100).sum()))]
    batch = checked(learns_everything)(records)
    for row, record in enumerate(records):
        assert batch["token_weights"][row][batch["labels"][row] != -100].tolist() == record["weights"]


@pytest.mark.parametrize("policy", ["truncate", "drop"])
def test_a_record_that_is_long_and_has_no_label_is_left_out_once(policy):
    whole = VisionCollator(PROCESSOR)(tiny_records(4))
    row = int(whole["attention_mask"].sum(1).argmax())
    limit = int(whole["attention_mask"].sum(1).max()) - 1
    collator = checked(without_labels_of(f"r{row}"), limit, on_long=policy, on_bad="skip")
    assert collator(tiny_records(4))["long_records"].tolist() == [1, 0]


def test_the_batch_says_how_its_records_are_called():
    assert checked(learns_everything, with_ids=True)(tiny_records(2))["record_ids"] == ["record 'r0'", "record 'r1'"]
    assert "record_ids" not in checked(learns_everything)(tiny_records(2))


@pytest.mark.parametrize("padding", [0, 4], ids=["on the right", "on the left"])
def test_a_row_is_cut_after_its_own_tokens_wherever_its_padding_is(padding):
    """10 columns, 6 tokens, of which 4 may stay."""
    places = slice(padding, padding + 6)
    batch = {
        "input_ids": torch.full((1, 10), 7),
        "attention_mask": torch.zeros(1, 10, dtype=torch.long),
        "labels": torch.full((1, 10), -100),
    }
    batch["attention_mask"][0, places], batch["labels"][0, places] = 1, 7
    LengthLimit(4, "truncate").cut(batch, [0], ["record 'a'"], {IMAGE})
    kept = [padding + column for column in range(4)]
    assert batch["attention_mask"][0].nonzero().flatten().tolist() == kept
    assert (batch["labels"][0] != -100).nonzero().flatten().tolist() == kept
