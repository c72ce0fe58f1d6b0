"""What a batch would stop at is found while data is loaded, where a collator is at hand; few records are rendered."""

import pytest

from seecal import VisionCollator, load_records
from seecal.data.collators import assistant_spans
from tests.support import processors
from tests.support.sources import messages, png
from tests.support.tiny import tiny_llava_processor

GOOD = {"id": "good", "messages": messages([("<image>a", "b")]), "images": [png()]}
ALTERNATES = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"


def chat(text="a", answer="b", first=()):
    def part(words):
        return [{"type": "text", "text": words}]

    return [*first, {"role": "user", "content": part(text)}, {"role": "assistant", "content": part(answer)}]


@pytest.mark.parametrize(
    ("family", "token"),
    [
        ("llava", "<image>"), ("qwen2_5_vl", "<|image_pad|>"), ("qwen2_5_vl", "<|video_pad|>"),
        ("gemma3", "<image_soft_token>"), ("gemma3", "<start_of_image>"),
        ("internvl", "<IMG_CONTEXT>"), ("mistral3", "[IMG]"), ("idefics3", "<image>"),
        ("ovis2", "<IMG_ATOM>"), ("mllama", "<|image|>"), ("smolvlm", "<image>"), ("llava_onevision", "<video>"),
    ],
)  # fmt: skip
def test_image_tokens_in_texts(family, token):
    collator = VisionCollator(getattr(processors, family)())
    rows = [
        GOOD,
        {"id": "a7", "messages": chat(f"See {token}?")},
        {"id": "b7", "messages": chat("a", f"It is {token}.")},
    ]
    assert len(load_records(rows)) == 3, "without a processor it may be a word like any other"
    said = rf"record 'a7' .entry 1.: a message's text must not contain '{token.replace('|', '.').replace('[', '.')}"
    with pytest.raises(ValueError, match=said.replace("]", ".")):
        load_records(rows, collator=collator)
    assert load_records(rows, collator=collator, on_bad="skip")["id"] == ["good"]
    with pytest.raises(ValueError, match=r"record 'a7'"):
        collator(list(load_records(rows[1:2])))


def test_turns_that_the_template_refuses():
    processor = tiny_llava_processor()
    processor.chat_template = ALTERNATES + processor.chat_template
    collator = VisionCollator(processor)
    rows = [GOOD, {"id": "a7", "messages": chat(first=[{"role": "system", "content": "Be brief."}])}]
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match=r"record 'a7' .*: the chat template cannot render its messages: the user begins"
        ):
            list(load_records(rows, collator=collator, streaming=streaming))
        data = load_records(rows, collator=collator, streaming=streaming, on_bad="skip")
        assert [record["id"] for record in data] == ["good"]
    with pytest.raises(ValueError, match=r"record 'a7'"):
        collator(list(load_records(rows)))


def test_the_same_parts_from_others_are_rendered_too():
    processor = tiny_llava_processor()
    processor.chat_template = ALTERNATES + processor.chat_template
    question, answer = chat()
    rows = [{"id": "good", "messages": [question, answer]}, {"id": "a7", "messages": [answer, question]}]
    with pytest.raises(ValueError, match=r"record 'a7' .*: the user begins"):
        load_records(rows, collator=VisionCollator(processor))


def test_what_the_collator_would_refuse_for_its_own_settings():
    rows = [{"id": "a7", "messages": [*chat(), *chat()[:1], {**chat()[1], "loss": False}]}]
    load_records(rows, collator=VisionCollator(tiny_llava_processor()))
    with pytest.raises(ValueError, match=r"record 'a7' .*leave no assistant turn to learn"):
        load_records(rows, collator=VisionCollator(tiny_llava_processor(), train_on="last"))


def test_paligemma_without_a_template_takes_one_pair():
    collator = VisionCollator(processors.paligemma())
    load_records([{"messages": chat()}], collator=collator)
    with pytest.raises(ValueError, match=r"record 'a7' .*PaliGemma takes one question and one answer"):
        load_records([{"id": "a7", "messages": chat() + chat()}], collator=collator)


def test_few_records_are_rendered(monkeypatch):
    collator = VisionCollator(tiny_llava_processor())
    rendered = []
    render = assistant_spans.render
    monkeypatch.setattr("seecal.data.collators.conversation.render", lambda *args: rendered.append(0) or render(*args))
    rows = [GOOD | {"id": str(index)} for index in range(50)]
    rows += [{"messages": chat(str(index))} for index in range(50)]
    rows += [{"messages": chat() * 2}, {"messages": [*chat(), *chat()[:1], {**chat()[1], "loss": True}]}]
    load_records(rows, collator=collator)
    assert len(rendered) == 4
