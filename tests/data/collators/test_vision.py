"""Labels of VisionCollator: exactly the assistant's words and what ends its turn, and errors that name the record."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from seecal.data.collators.checked import CheckedCollator
from seecal.data.collators.vision import VisionCollator
from tests.support import processors
from tests.support.tiny import (
    IMAGE_TOKENS,
    MARKED_TEMPLATE,
    PLAIN_TEMPLATE,
    tiny_dataset,
    tiny_image,
    tiny_llava_processor,
    tiny_records,
)

# What no template of ours may lose: an answer that repeats the prompt, blanks at the ends, brackets, another script.
ANSWERS = ["What colour is it?", "  It is red.\n", "[seecal<] [>seecal] {{ x }}", "è un gatto 🐈", "user\nassistant\n"]
TRIMMING = PLAIN_TEMPLATE.replace("{{ part.text }}", "{{ part.text | trim }}")
SPACED = PLAIN_TEMPLATE.replace("<|end|>", "{{ '  <|end|>' if m.role == 'assistant' else '<|end|>' }}")
ENDLESS = PLAIN_TEMPLATE.replace("<|end|>", "")


def record(answers, images=1, **fields):
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": "What colour is it?"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": [tiny_image("red")] * images, **fields}


def part(text=None):
    return {"type": "image"} if text is None else {"type": "text", "text": text}


def turns(collator, batch, row=0):
    """The decoded runs of consecutive labels of one row."""
    labels = batch["labels"][row].tolist()
    runs, run = [], []
    for label in [*labels, -100]:
        if label != -100:
            run.append(label)
        elif run:
            runs.append(collator.tokenizer.decode(run))
            run = []
    return runs


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def test_labels_are_the_answers_and_their_ends(template):
    collator = VisionCollator(tiny_llava_processor(template))
    batch = collator([record([answer, "It is."]) for answer in ANSWERS])
    for row, answer in enumerate(ANSWERS):
        assert turns(collator, batch, row) == [f"{answer}<|end|>", "It is.<|end|>"]
    placed = batch["labels"] != -100
    assert torch.equal(batch["labels"][placed], batch["input_ids"][placed])


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def test_a_special_token_inside_an_answer_is_not_its_end(template):
    collator = VisionCollator(tiny_llava_processor(template))
    batch = collator([record(["It is <|end|> red."])])
    assert turns(collator, batch) == ["It is <|end|> red.<|end|>"]


def test_a_template_that_trims():
    collator = VisionCollator(tiny_llava_processor(TRIMMING))
    batch = collator([record([answer]) for answer in ANSWERS])
    assert [turns(collator, batch, row) for row in range(len(ANSWERS))] == [
        [f"{one.strip()}<|end|>"] for one in ANSWERS
    ]


def test_blanks_before_the_end_of_turn_are_labels_too():
    collator = VisionCollator(tiny_llava_processor(SPACED))
    assert turns(collator, collator([record(["It is red."])])) == ["It is red.  <|end|>"]


def test_a_template_without_an_end_of_turn_is_mentioned_once(caplog):
    collator = VisionCollator(tiny_llava_processor(ENDLESS))
    for _ in range(2):
        assert turns(collator, collator([record(["It is red."])])) == ["It is red."]
    assert caplog.text.count("nothing teaches the model to stop") == 1


def test_a_template_that_rewrites_answers_is_refused():
    collator = VisionCollator(
        tiny_llava_processor(PLAIN_TEMPLATE.replace("{{ part.text }}", "{{ part.text | upper }}"))
    )
    with pytest.raises(ValueError, match="record 'a7': the chat template rewrites"):
        collator([record(["It is red."], id="a7")])


def test_a_system_message_and_parts():
    collator = VisionCollator(tiny_llava_processor())
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part("What"), part(), part("is it?"), part()]},
        {"role": "assistant", "content": [part("It is red."), part("It is."), part("")]},
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "b", "image": None}]},
        {"role": "assistant", "content": "It is green."},
    ]
    images = [tiny_image("red"), tiny_image("blue"), tiny_image("green")]
    batch = collator([{"messages": messages, "images": images}])
    assert turns(collator, batch) == ["It is red.It is.<|end|>", "It is green.<|end|>"]
    assert batch["pixel_values"].shape[0] == 3
    means = batch["pixel_values"].mean((2, 3))
    assert [int(one.argmax()) for one in means] == [0, 2, 1], "the images stand in the order of their parts"
    assert (batch["input_ids"] == collator.tokenizer.convert_tokens_to_ids("<image>")).sum() == 3 * IMAGE_TOKENS


def test_neighbouring_images_and_repeated_turns():
    collator = VisionCollator(tiny_llava_processor())
    messages = [
        {"role": "user", "content": [part(), part(), part("a")]},
        {"role": "assistant", "content": "It is red."},
        {"role": "user", "content": [part(), part("a")]},
        {"role": "assistant", "content": "It is red."},
        {"role": "user", "content": [part(), part("a")]},
        {"role": "assistant", "content": "It is red."},
    ]
    batch = collator([{"messages": messages, "images": [tiny_image("red")] * 4}])
    assert turns(collator, batch) == ["It is red.<|end|>"] * 3


def test_text_only_rows_and_padding():
    collator = VisionCollator(tiny_llava_processor(), pad_to_multiple_of=16)
    collator.tokenizer.padding_side = "left"  # as a processor saved for generation has it
    records = [record(["It is."], images=0), record(["It is red. It is red."]), record(["a"], images=0)]
    batch = collator(records)
    assert [turns(collator, batch, row) for row in range(3)] == [
        ["It is.<|end|>"],
        ["It is red. It is red.<|end|>"],
        ["a<|end|>"],
    ]
    assert batch["input_ids"].shape[1] % 16 == 0
    assert batch["attention_mask"].diff(dim=1).max() == 0, "padding only on the right"
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    alone = collator([records[0], records[2]])
    assert "pixel_values" not in alone
    assert turns(collator, alone, 1) == ["a<|end|>"]


def test_the_padding_token_may_be_the_end_of_turn():
    processor = tiny_llava_processor()
    processor.tokenizer.pad_token = "<|end|>"
    collator = VisionCollator(processor)
    batch = collator([record(["It is red. It is."]), record(["a"])])
    assert turns(collator, batch, 1) == ["a<|end|>"]


def test_special_tokens_at_the_start_as_when_the_model_is_used():
    processor = tiny_llava_processor()
    bos = processor.tokenizer.bos_token_id
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    collator = VisionCollator(processor)
    batch = collator([record(["It is red."])])
    assert batch["input_ids"][0].tolist().count(bos) == 1
    assert batch["input_ids"][0, 0] == bos
    assert turns(collator, batch) == ["It is red.<|end|>"]
    collator.chat_template = "<s>" + PLAIN_TEMPLATE
    assert collator([record(["It is red."])])["input_ids"][0].tolist() == batch["input_ids"][0].tolist()


def test_a_dataset_row_and_the_image_column():
    collator = VisionCollator(tiny_llava_processor())
    rows = [tiny_dataset(6)[index] for index in range(6)]
    batch = collator(rows)
    expected = collator(tiny_records(6))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    single = {"messages": rows[0]["messages"], "image": rows[0]["images"][0]}
    assert turns(collator, collator([single])) == turns(collator, batch)
    assert collator([{"messages": rows[0]["messages"], "image": None}])["input_ids"].shape[0] == 1


def test_modes_of_images_agree():
    collator = VisionCollator(tiny_llava_processor())
    images = [tiny_image("red").convert(mode) for mode in ("L", "RGBA", "P", "RGB")]
    batch = collator([record(["a"], images=0) | {"images": [image]} for image in images])
    assert batch["pixel_values"].shape[:2] == (4, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record([], images=2) | {"messages": [{"role": "user", "content": [part(), part("a")]}]}, "2 images, but 1 place"),
        (record([], images=0) | {"messages": [{"role": "user", "content": [part()]}]}, "0 images, but 1 place"),
        (record(["<image> and <image>"]), "1 image, but 2 placeholders"),
        (record([[part("a <image> b")]]), "1 images, but 2 image placeholders in its text.*'<image>'"),
        (record([""]), "no label"),
        (record(["  "]), "no label"),
        (record([]) | {"messages": [{"role": "user", "content": "a"}]}, "no label"),
        ({"text": "a"}, "no messages; it has id, text"),
        (record(["a"]) | {"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of type 'video'"),
        (record(["a"]) | {"messages": [{"role": "user", "content": [{"type": "image", "url": "http://a/b"}]}]}, "is a URL"),
        (record(["It is. " * 60]), "are more than max_length=64.*Set max_length to at least"),
    ],
    ids=["too many", "too few", "marks", "literal", "empty", "blank", "no answer", "no messages", "video", "url", "long"],
)  # fmt: skip
def test_errors_name_the_record(bad, message):
    collator = VisionCollator(tiny_llava_processor(), max_length=64)
    good = record(["a"])
    with pytest.raises(ValueError, match=f"record 'r-9': .*{message}"):
        collator([good, {**bad, "id": "r-9"}])
    bad.pop("id", None)
    with pytest.raises(ValueError, match="record 1 of the batch"):
        collator([good, bad])


def test_an_image_is_never_cut():
    collator = VisionCollator(tiny_llava_processor(), max_length=IMAGE_TOKENS)
    with pytest.raises(ValueError, match=f"max_length={IMAGE_TOKENS}, and cutting could cut an image"):
        collator([record(["a"])])


def test_insertions_that_are_no_images_are_refused():
    processor = tiny_llava_processor()
    processor.replace_image_token = lambda *_, **__: "red"
    with pytest.raises(ValueError, match="cannot be followed"):
        VisionCollator(processor)([record(["a"])])


def test_processors_that_cannot_be_used():
    processor = tiny_llava_processor()
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        VisionCollator(processor)


def test_another_collator_is_held_to_the_rules():
    inner = VisionCollator(tiny_llava_processor())
    image = inner.tokenizer.convert_tokens_to_ids("<image>")

    def all_labels(records):
        batch = inner(records)
        return {**batch, "labels": batch["input_ids"].clone()}

    batch = CheckedCollator(all_labels, None, frozenset({image}))([record(["a"])])
    assert (batch["labels"][batch["input_ids"] == image] == -100).all()
    with pytest.raises(ValueError, match=r"record 'z': \d+ tokens.*max_length=8"):
        CheckedCollator(all_labels, 8, frozenset({image}))([record(["a"], id="z")])


def test_the_record_that_the_processor_fails_on_is_named_with_its_sizes():
    """Not its whole batch: an image that is too thin for a family's resizing."""
    collator = VisionCollator(processors.qwen2_5_vl())

    def chat(name, size):
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "a"}]
        return {"id": name, "messages": messages, "images": [tiny_image("red", size)]}

    with pytest.raises(
        ValueError, match=r"^record 'thin': Qwen2_5_VLProcessor failed on them: .*images of 1000 × 2 pixels"
    ):
        collator([chat("good", (40, 40)), chat("thin", (1000, 2)), chat("also good", (40, 40))])
