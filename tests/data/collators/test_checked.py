"""Another collator's batches under our rules: length, labels, weights that come with the records."""

import pytest
import torch

from seecal import VisionCollator
from seecal.data.collators.checked import CheckedCollator
from tests.support.tiny import tiny_llava_processor, tiny_records


@pytest.fixture(scope="module")
def plain():
    return VisionCollator(tiny_llava_processor())


def checked(plain, max_length=None, **settings):
    image = plain.tokenizer.convert_tokens_to_ids("<image>")
    return CheckedCollator(plain, max_length, frozenset({image}), **settings)


def unlabelled(plain):
    """A collator that takes the labels of record r1 away."""

    def collate(records):
        batch = plain(records)
        for row, record in enumerate(records):
            if record["id"] == "r1":
                batch["labels"][row] = -100
        return batch

    return collate


def test_a_record_without_a_label(plain, caplog):
    image = plain.tokenizer.convert_tokens_to_ids("<image>")
    strict = CheckedCollator(unlabelled(plain), None, frozenset({image}))
    with pytest.raises(ValueError, match="record 'r1': no label"):
        strict(tiny_records(3))
    lenient = CheckedCollator(unlabelled(plain), None, frozenset({image}), on_bad="skip")
    for _ in range(2):
        assert lenient(tiny_records(3))["long_records"].tolist() == [1, 0]
    assert caplog.text.count("record 'r1': no label") == 1


def test_a_record_that_loses_all_its_labels(plain):
    first = int((plain(tiny_records(1))["labels"][0] != -100).nonzero()[0])
    with pytest.raises(ValueError, match=f"record 'r0': no label: .*max_length={first}.*on_bad"):
        checked(plain, first, on_long="truncate")(tiny_records(1))
    batch = checked(plain, first, on_long="truncate", on_bad="skip")(tiny_records(1))
    assert batch["long_records"].tolist() == [1, 0]
    assert (batch["labels"] == -100).all()


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_lengths(plain, policy):
    whole = plain(tiny_records(4))
    lengths = whole["attention_mask"].sum(1)
    limit = int(lengths.max()) - 3
    batch = checked(plain, limit, on_long=policy)(tiny_records(4))
    row = int(lengths.argmax())
    long = int((lengths > limit).sum())
    assert 0 < long < 4
    assert batch["long_records"].tolist() == ([long, 0] if policy == "drop" else [0, long])
    left, before = (int((made["labels"][row] != -100).sum()) for made in (batch, whole))
    assert (left == 0) if policy == "drop" else (0 < left < before)
    if policy == "truncate":
        assert batch["input_ids"].shape[1] == limit


def with_weights(plain, records):
    counts = (plain(records)["labels"] != -100).sum(1).tolist()
    return [
        {**record, "weights": [float(n) for n in range(count)]} for record, count in zip(records, counts, strict=True)
    ]


def test_weights_reach_the_batch(plain):
    records = with_weights(plain, tiny_records(3))
    batch = checked(plain)(records)
    assert torch.equal(batch["token_weights"], plain(records)["token_weights"])
    for row, record in enumerate(records):
        assert batch["token_weights"][row][batch["labels"][row] != -100].tolist() == record["weights"]
    assert "token_weights" not in checked(VisionCollator(tiny_llava_processor()))(tiny_records(3))


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "1 weights for"), (None, "no weights for"), ([-1.0] * 99, "99 weights for")]
)
def test_weights_that_do_not_fit_name_the_record(plain, weights, message):
    def without(records):  # so that it is not the inner collator that finds them
        return plain([{**record, "weights": None} for record in records])

    records = with_weights(plain, tiny_records(3))
    records[1]["weights"] = weights
    collator = checked(plain)
    collator.collator = without
    with pytest.raises(ValueError, match=f"record 'r1': {message}"):
        collator(records)
