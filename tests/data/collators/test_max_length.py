"""Records longer than max_length: an error, left out, or cut after the last image; counted, and logged by the trainer."""

import logging

import pytest
import torch

import seecal
from seecal import CALConfig, CALTrainer
from seecal.constants import LENGTH_COUNTS as COUNTS
from seecal.data.collators.checked import CheckedCollator
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
    assert "record 'long' is left out: " in caplog.text
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


def test_a_record_that_loses_all_its_labels_is_one_without_an_answer(processor, caplog):
    whole = VisionCollator(processor)([SHORT])
    first = int((whole["labels"][0] != -100).nonzero()[0])
    with pytest.raises(ValueError, match=rf"record 'short': no label: .*max_length={first}.*set on_bad to skip"):
        collate(processor, [SHORT], first, "truncate")
    caplog.clear()
    collator = VisionCollator(processor, first + 1, on_long="truncate", on_bad="skip")
    late = record("late", "It is red.", question="What colour is it? " * 3)
    batch = collator([late, record("cut", "It is red.")])
    assert batch.pop(COUNTS).tolist() == [1, 1]
    assert int(batch["attention_mask"][0].sum()) <= 2, "in its place stands a row of one word"
    assert batch["pixel_values"].shape[0] == 1
    assert (batch["labels"][0] == -100).all()
    assert (batch["labels"][1] != -100).nonzero().flatten().tolist() == [first]
    assert torch.equal(batch["labels"][1], whole["labels"][0, : first + 1])
    assert batch["input_ids"].shape[1] == first + 1
    collator([late, late])
    assert [entry.getMessage().split(":")[0] for entry in caplog.records] == [
        "left out, record 'late'",
        f"record 'cut' is cut from {int(whole['attention_mask'].sum())} tokens to max_length={first + 1} "
        "(on_long='truncate'). This is said once; the log's records_truncated counts them all",
    ]


def test_what_is_left_out_or_cut_is_said_once_with_the_first_name(processor, lengths, caplog):
    for policy, said in (("drop", "is left out: "), ("truncate", "is cut from ")):
        caplog.clear()
        collator = VisionCollator(processor, lengths[0], on_long=policy)
        counted = [collator([{**LONG, "id": f"l{n}"}, {**LONG, "id": f"m{n}"}])[COUNTS].sum() for n in range(12)]
        assert sum(counted) == 24
        (entry,) = caplog.records
        assert f"record 'l0' {said}{lengths[1]} tokens" in entry.getMessage()


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
@pytest.mark.parametrize("multiple", [8, 7])
def test_rows_stay_a_multiple_after_a_cut(processor, lengths, multiple, policy):
    limit = lengths[1] - 3
    if policy == "error":
        limit = None
    collator = VisionCollator(processor, limit, multiple, policy)
    batch = collator([SHORT, LONG])
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    longest = int(batch["attention_mask"].sum(1).max())
    assert longest <= width < longest + multiple
    assert batch["attention_mask"].shape == batch["labels"].shape == (2, width)
    assert batch["attention_mask"].diff(dim=1).max() == 0, "padding only on the right"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_another_collators_rows_stay_a_multiple_too(processor, lengths):
    inner = VisionCollator(processor, pad_to_multiple_of=16)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    checked = CheckedCollator(inner, lengths[0] + 2, frozenset({image}), "truncate", pad_to_multiple_of=16)
    batch = checked([SHORT, LONG])
    assert batch["input_ids"].shape[1] % 16 == 0
    assert batch["input_ids"].shape[1] < inner([SHORT, LONG])["input_ids"].shape[1]


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
