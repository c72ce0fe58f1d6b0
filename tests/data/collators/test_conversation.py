"""One record as text, ids and labelled ids, before any image is looked at."""

import pytest

from seecal.data.collators.conversation import NO_TOKEN, ConversationEncoder, NoLabel, in_parts, record_name
from tests.support import processors
from tests.support.tiny import MARKED_TEMPLATE, PLAIN_TEMPLATE, tiny_llava_processor


def record(answer="It is red.", images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["no file"] * images}


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def test_a_conversation(template):
    encoder = ConversationEncoder(tiny_llava_processor(template))
    made = encoder.encode(record(images=2), "a")
    expected = "<|start|>user\n<image><image>What?<|end|>\n<|start|>assistant\nIt is red.<|end|>\n"
    if template == MARKED_TEMPLATE:  # its block eats the line breaks after the turns
        expected = expected.replace("|end|>\n", "|end|>")
    assert made.text == expected
    assert made.name == "a"
    assert made.text[made.prefix :].rstrip("\n") == "It is red.<|end|>"
    assert made.images == ["no file"] * 2, "nothing is decoded here"
    assert made.ids.ids == encoder.tokenizer(made.text)["input_ids"]
    image = encoder.tokenizer.convert_tokens_to_ids("<image>")
    assert made.ids.placeholders == [at for at, index in enumerate(made.ids.ids) if index == image]
    labels = [index for index, is_label in zip(made.ids.ids, made.labelled, strict=True) if is_label]
    assert encoder.tokenizer.decode(labels) == "It is red.<|end|>"
    assert len(made.labelled) == len(made.ids.movable) == len(made.ids.ids)
    assert not any(movable and label for movable, label in zip(made.ids.movable, made.labelled, strict=True))
    assert encoder.placeholder_ids == [image]
    assert encoder.image_ids == {image}


def test_a_placeholder_that_is_no_token():
    """Ovis 2's: it has one id in the conversation, and its processor finds it in the text."""
    encoder = ConversationEncoder(processors.ovis2())
    made = encoder.encode(record(images=2), "a")
    assert [made.ids.ids[at] for at in made.ids.placeholders] == [NO_TOKEN] * 2
    assert encoder.placeholder_ids == []


def test_another_template_and_none():
    encoder = ConversationEncoder(tiny_llava_processor(), PLAIN_TEMPLATE.replace("<|start|>", "<|start|>the "))
    assert encoder.encode(record(), "a").text.startswith("<|start|>the user")
    processor = tiny_llava_processor()
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="LlavaProcessor has no chat template"):
        ConversationEncoder(processor)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "a"}],
        [{"role": "system", "content": "a"}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
    ],
    ids=["question only", "system and question", "blank answer", "no content"],
)
@pytest.mark.parametrize("family", ["llava", "paligemma", "gemma3"])
def test_no_answer_is_an_error_of_its_own(family, messages):
    """PaliGemma's own form and templates that take turns in pairs would fail on most of them in other words."""
    encoder = ConversationEncoder(getattr(processors, family)())
    with pytest.raises(NoLabel, match=r"a: no label: it has no assistant message with text. .*set on_bad to skip"):
        encoder.encode({"messages": messages}, "a")


def test_where_special_tokens_come_from():
    assert ConversationEncoder(tiny_llava_processor()).adds_special_tokens("<|start|>user")
    assert not ConversationEncoder(tiny_llava_processor()).adds_special_tokens("<s><|start|>user")
    assert not ConversationEncoder(processors.paligemma()).adds_special_tokens("user")


@pytest.mark.parametrize("family", ["llava", "gemma3", "mistral3", "mllama", "paligemma", "qwen2_5_vl"])
def test_an_empty_row_begins_as_the_others_do(family):
    encoder = ConversationEncoder(getattr(processors, family)())
    first = encoder.encode(record(images=0), "a")
    special = encoder.adds_special_tokens(first.text)
    empty = encoder.empty("b", special)
    assert empty.ids.ids[-1] == encoder.tokenizer.eos_token_id
    begins = family not in ("paligemma", "qwen2_5_vl")  # its own form; no token at the start
    assert (first.ids.ids[0] == encoder.tokenizer.bos_token_id) == begins or family == "paligemma"
    assert len(empty.ids.ids) == (2 if begins else 1)
    assert not any(empty.labelled)
    assert empty.images == []


def test_names_and_parts():
    assert record_name({"id": 0}, 3) == "record 0"
    assert record_name({"id": None}, 3) == record_name({}, 3) == "record 3 of the batch (it has no id)"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a", "image": None}], "name": None},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]
    parted, images = in_parts({"messages": messages, "images": None}, "a")
    assert parted == [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "reasoning_content": "c", "content": [{"type": "text", "text": "b"}]},
    ]
    assert images == []
    single = {"messages": [{"role": "user", "content": "a"}], "image": "x.png"}
    assert in_parts(single, "a")[1] == in_parts({**single, "image": None, "images": "x.png"}, "a")[1] == ["x.png"]
