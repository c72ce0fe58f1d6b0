"""Records longer than max_length: an error, left out, or cut after the last image; counted, and logged by the trainer."""

import logging

import pytest
import torch

import seecal
from seecal import CALConfig, CALTrainer
from seecal.constants import LENGTH_COUNTS as COUNTS
from seecal.data.collators.max_length import LengthLimit
from seecal.data.collators.vision import VisionCollator
from tests.support.tiny import tiny_dataset, tiny_image, tiny_llava, tiny_llava_processor


def record(name, answer, images=1, question="What colour is it?"):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "images": [tiny_image("red") for _ in range(images)]}


SHORT, LONG = record("short", "It is red."), record("long", "It is red." + " It is green." * 12)
TEXT = record("text", "It is blue.", images=0)


@pytest.fixture(scope="module")
def processor():
    return tiny_llava_processor()


@pytest.fixture(scope="module")
def lengths(processor):
    return VisionCollator(processor)([SHORT, LONG, TEXT])["attention_mask"].sum(1).tolist()


def collate(processor, records, limit, policy):
    return VisionCollator(processor, limit, on_long=policy)(records)


def test_error_names_the_record_both_lengths_and_the_remedies(processor, lengths):
    with pytest.raises(ValueError, match=rf"'long'.*{lengths[1]} tokens.*max_length={lengths[0]}.*on_long"):
        collate(processor, [SHORT, LONG], lengths[0], "error")
    assert COUNTS not in collate(processor, [SHORT], lengths[0], "error")


def test_drop_leaves_the_record_out_and_the_others_as_they_are(processor, lengths, caplog):
    with caplog.at_level(logging.WARNING, logger="seecal"):
        batch = collate(processor, [SHORT, LONG, TEXT], lengths[0], "drop")
    assert batch.pop(COUNTS).tolist() == [1, 0]
    assert "'long' left out (1 so far)" in caplog.text
    alone = VisionCollator(processor)([SHORT, TEXT])
    assert torch.equal(batch["input_ids"][[0, 2]], alone["input_ids"])
    assert torch.equal(batch["labels"][[0, 2]], alone["labels"])
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    assert (batch["labels"][1] == -100).all()
    assert int(batch["attention_mask"][1].sum()) <= 2
    model = seecal.enable_cal(tiny_llava().train())
    torch.testing.assert_close(model(**batch).loss, model(**alone).loss, atol=1e-5, rtol=1e-5)


def test_a_batch_of_which_nothing_is_left_still_runs(processor, lengths):
    batch = collate(processor, [LONG, LONG], lengths[0], "drop")
    assert batch.pop(COUNTS).tolist() == [2, 0]
    assert "pixel_values" not in batch
    assert float(seecal.enable_cal(tiny_llava().train())(**batch).loss.detach()) == 0


@pytest.mark.parametrize("cut", [1, 3])
def test_truncate_cuts_text_after_the_last_image(processor, lengths, cut):
    whole = VisionCollator(processor)([LONG])
    limit = lengths[1] - cut
    batch = collate(processor, [SHORT, LONG, TEXT], limit, "truncate")
    assert batch.pop(COUNTS).tolist() == [0, 1]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, limit)
    assert torch.equal(batch["input_ids"][1], whole["input_ids"][0, :limit])
    assert torch.equal(batch["labels"][1], whole["labels"][0, :limit])
    alone = VisionCollator(processor)([SHORT])
    assert torch.equal(batch["labels"][0, : lengths[0]], alone["labels"][0])
    assert torch.isfinite(seecal.enable_cal(tiny_llava().train())(**batch).loss)


def test_truncate_never_cuts_an_image(processor, lengths):
    late = record("late", "It is red. It is red.", images=0)
    late["messages"] = [
        {"role": "user", "content": [{"type": "text", "text": "a b c " * 6}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
    ]
    late["images"] = [tiny_image("red")]
    ids = VisionCollator(processor)([late])["input_ids"][0]
    images = (ids == processor.tokenizer.convert_tokens_to_ids("<image>")).nonzero().flatten() + 1
    for limit in (int(images[0]), int(images[3]), int(images[-1]) - 1):
        with pytest.raises(ValueError, match=rf"'late'.*ends at token {int(images[-1])}.*cannot be cut"):
            collate(processor, [late], limit, "truncate")


def test_truncate_counts_a_record_without_a_label_left_as_dropped(processor):
    ids = VisionCollator(processor)([SHORT])
    first = int((ids["labels"][0] != -100).nonzero()[0])
    batch = collate(processor, [SHORT], first, "truncate")
    assert batch[COUNTS].tolist() == [1, 0]
    assert (batch["labels"] == -100).all()


@pytest.mark.parametrize("bad", [{"on_long": "cut"}, {"max_length": 0}])
def test_bad_settings_are_named(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        LengthLimit(**bad)


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_the_trainer_counts_them_in_its_log(policy, tmp_path, lengths):
    config = CALConfig(
        str(tmp_path),
        max_length=lengths[0] + 1,
        on_long=policy,
        per_device_train_batch_size=4,
        num_train_epochs=1,
        logging_steps=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        eval_strategy="epoch",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    data = tiny_dataset(16)
    trainer = CALTrainer(
        tiny_llava(), config, train_dataset=data, eval_dataset=data, processing_class=tiny_llava_processor()
    )
    too_long = sum(
        int(VisionCollator(trainer.processing_class)([one])["attention_mask"].sum()) > lengths[0] + 1 for one in data
    )
    assert 0 < too_long < 16
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "records_dropped" in entry)
    assert logged["records_dropped"] + logged["records_truncated"] == too_long
    assert (logged["records_dropped"] == too_long) or policy == "truncate"
