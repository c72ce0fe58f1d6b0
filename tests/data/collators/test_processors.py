"""PaliGemma: a prefix read in both directions, a suffix that is learnt, rows without an image, several turns."""

import pytest
import torch
from datasets import Dataset

from seecal import CALConfig
from seecal.data.collators.vision import VisionCollator
from tests.families.test_raw_data import Recorded, answers, labels_of
from tests.support import processors
from tests.support.raw_data import assistant, image, model_of, processor_of, records, text, user
from tests.support.tiny import tiny_image

SEVERAL = [
    user(text("Look: "), image(), text("What is it?")),
    assistant("It is red."),
    user(image(), text("It is?")),
    assistant("It is blue."),
]


def several(**changes):
    return {"id": "s", "messages": SEVERAL, "images": [tiny_image("red"), tiny_image("blue")], **changes}


def test_it_is_what_the_processor_makes_of_prefix_and_suffix():
    processor, rows = processor_of("paligemma"), records("paligemma")[:2]
    batch = VisionCollator(processor)(rows)
    prefixes = ["".join(part.get("text", "<image>") for part in row["messages"][0]["content"]) for row in rows]
    counts = [prefix.count("<image>") for prefix in prefixes]
    prefixes = ["<image>" * n + prefix.replace("<image>", "") for n, prefix in zip(counts, prefixes, strict=True)]
    suffixes = [answers(row["messages"])[0] for row in rows]
    images = [row["images"] for row in rows]
    own = processor(
        text=prefixes, suffix=suffixes, images=images, padding=True, padding_side="right", return_tensors="pt"
    )
    for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values"):
        assert torch.equal(batch[name], own[name]), name
    assert torch.equal(batch["labels"], own["labels"])


def test_a_row_without_an_image_has_the_same_form():
    collator = VisionCollator(processor_of("paligemma"))
    batch = collator(records("paligemma")[1:])
    used = batch["attention_mask"][1].bool()
    assert collator.tokenizer.decode(batch["input_ids"][1][used]) == "<bos>What is it?\nIt is.<eos>"
    learnt = batch["labels"][1] != -100
    assert torch.equal(batch["token_type_ids"][1], learnt.long())


@pytest.mark.parametrize(
    ("messages", "roles"),
    [
        (SEVERAL, "user, assistant, user, assistant"),
        ([{"role": "system", "content": "b"}, *SEVERAL[:2]], "system, user, assistant"),
        (SEVERAL[1:2], "assistant"),
    ],
)
def test_other_conversations_need_a_template(messages, roles):
    count = sum(part == {"type": "image"} for one in messages for part in one["content"])
    row = several(messages=messages, images=[tiny_image("red")] * count)
    with pytest.raises(
        ValueError, match=rf"record 's': its messages are {roles}, but .* give the processor a chat_template"
    ):
        VisionCollator(processor_of("paligemma"))([row])


def test_several_turns_with_a_template(tmp_path):
    """All before the first answer is the prefix; the rest is read in order, and only answers are learnt."""
    processor = processors.paligemma()
    processor.chat_template = processors.prefixed()
    collator = VisionCollator(processor)
    rows = [several(), *records("paligemma")[1:]]
    assert labels_of(collator, rows)[0] == "It is red.<eos>It is blue.<eos>"
    batch = collator(rows)
    for labels, types, mask in zip(batch["labels"], batch["token_type_ids"], batch["attention_mask"], strict=True):
        first = int((labels != -100).nonzero()[0])
        assert types.tolist() == [0] * first + [1] * int(mask.sum() - first) + [0] * int((mask == 0).sum())
    args = CALConfig(
        str(tmp_path), max_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        train_sampling_strategy="sequential", logging_steps=1,
    )  # fmt: skip
    trainer = Recorded(model_of("paligemma"), args, train_dataset=Dataset.from_list(rows), processing_class=processor)
    trainer.train()
    measured = trainer.cal.visual_delta
    assert measured.has_contrast[measured.sample < 2].all()
    assert not measured.has_contrast[measured.sample == 2].any()
    assert torch.tensor(trainer.state.log_history[0]["loss"]).isfinite()


def test_a_later_answer_does_not_reach_an_earlier_one():
    """What stands in the suffix is read in order: another second turn leaves the first turn's logits alone."""
    processor = processors.paligemma()
    processor.chat_template = processors.prefixed()
    collator, model = VisionCollator(processor), model_of("paligemma").eval()
    other = [*SEVERAL[:3], assistant("What colour is it?")]
    batches = [dict(collator([several(messages=messages)])) for messages in (SEVERAL, other)]
    first = int((batches[0]["labels"][0] != -100).nonzero()[0])
    ends = first + 4
    with torch.no_grad():
        logits = [model(**batch).logits[0, first - 1 : ends] for batch in batches]
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
