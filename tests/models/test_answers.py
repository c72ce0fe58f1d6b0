"""Answers in batches: those that each record gets alone, whatever stands beside it; what fails is named."""

from types import SimpleNamespace

import pytest
import torch

from seecal import disable_cal, enable_cal
from seecal.models.generate import _batch, answers, batches_of_answers, prompt_of, reply
from tests.models.test_generate import paligemma_of, scaled
from tests.support import processors
from tests.support.tiny import tiny_image, tiny_llava, tiny_llava_processor


def record(number, question, *colours, answer="It is red."):
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"id": f"r{number}", "messages": messages, "images": [tiny_image(colour) for colour in colours]}


# Text-only rows, one image, two, long and short questions, with and without an answer of its own
MIXED = [
    record(0, "What colour is it?", "red"),
    record(1, "Why?"),
    record(2, "<image> or <image>: which of the two is the one that you would call blue?", "red", "blue"),
    record(3, "Name the colour of this square please.", "green", answer=None),
    record(4, "How many squares are there in all of the pictures that you have seen today?", answer=None),
    record(5, "Colour?", "yellow"),
    record(6, "Is it?", "blue"),
]


def llava():
    processor, model = tiny_llava_processor(), scaled(tiny_llava().float())
    model.generation_config.eos_token_id = None
    return model, processor


def paligemma():
    processor = processors.paligemma()
    model = paligemma_of(processor)
    model.generation_config.eos_token_id = None
    return model, processor


@pytest.mark.parametrize(("make", "records"), [(llava, MIXED), (paligemma, [MIXED[at] for at in (0, 1, 3, 4, 5)])])
def test_a_batch_changes_no_answer(make, records):
    model, processor = make()
    alone = answers(model, processor, records, max_new_tokens=6, batch_size=1)
    assert answers(model, processor, records, max_new_tokens=6, batch_size=4) == alone
    assert answers(model, processor, records, max_new_tokens=6, batch_size=7) == alone
    assert len(set(alone)) > 3, "the questions matter"


def test_a_record_is_asked_as_seecal_chat_asks(tmp_path):
    model, processor = llava()
    tiny_image("red").save(tmp_path / "red.png")
    one = {"messages": MIXED[0]["messages"], "images": [str(tmp_path / "red.png")]}
    expected = reply(model, processor, tmp_path / "red.png", "What colour is it?", max_new_tokens=5)
    assert answers(model, processor, [one], max_new_tokens=5) == [expected]


def test_the_last_answer_is_not_shown_but_those_before_it_are():
    model, processor = llava()
    asked = record(0, "What?", "red", answer="Red.")
    wrong = record(0, "What?", "red", answer="Something else.")
    longer = [*asked["messages"], {"role": "user", "content": "Sure?"}]
    first, second, third = answers(model, processor, [asked, wrong, {**asked, "messages": longer}], max_new_tokens=5)
    assert first == second != third
    other = [*wrong["messages"], {"role": "user", "content": "Sure?"}]
    assert answers(model, processor, [{**wrong, "messages": other}], max_new_tokens=5) != [third]


def test_batches_come_one_after_the_other_and_records_are_read_as_they_are_needed():
    model, processor = llava()
    read = []
    stream = (read.append(one["id"]) or one for one in MIXED)
    parts = batches_of_answers(model, processor, stream, max_new_tokens=2, batch_size=3)
    assert len(next(parts)) == 3
    assert read == ["r0", "r1", "r2"]
    assert [len(part) for part in parts] == [3, 1]


def test_the_model_is_left_as_it_was_and_cal_changes_nothing():
    model, processor = llava()
    expected = answers(model, processor, MIXED, max_new_tokens=4)
    model.train()
    model.model.vision_tower.eval()
    enable_cal(model)
    assert answers(model, processor, MIXED, max_new_tokens=4) == expected
    assert model.training
    assert not model.model.vision_tower.training
    disable_cal(model)


def test_generation_settings_reach_the_model():
    model, processor = llava()
    expected = answers(model, processor, MIXED[:2], max_new_tokens=6)
    torch.manual_seed(0)
    hot = {"do_sample": True, "temperature": 50.0}
    assert answers(model, processor, MIXED[:2], max_new_tokens=6, generation=hot) != expected


def without_images(one):
    return {**one, "images": []}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: without_images(MIXED[0]) | {"messages": MIXED[2]["messages"]}, "record 'r0': 0 images, but 2 placeh"),
        (lambda: record(9, [{"type": "text", "text": "<image>?"}], answer=None), "record 'r9' holds '<image>'"),
        (lambda: {"id": "r9", "messages": [{"role": "assistant", "content": "Hm."}]}, "record 'r9': nothing stands"),
        (lambda: record(9, "What?") | {"images": ["/no/such.png"]}, "record 'r9'.*no such file"),
        (lambda: {"id": "r9", "question": "What?"}, "record 'r9': no messages"),
    ],
)
def test_a_record_that_cannot_be_asked_is_named(bad, message):
    model, processor = llava()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        answers(model, processor, [MIXED[1], bad(), MIXED[0]], max_new_tokens=2)


def test_what_the_model_fails_on_is_an_error_and_no_empty_answer(monkeypatch):
    model, processor = llava()

    def fails(*args, **kwargs):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(
        ValueError, match=r"record 'r0', record 'r1': LlavaFor.* failed to answer: RuntimeError: out of l"
    ):
        answers(model, processor, MIXED[:2])
    assert not model.training


def test_what_the_processor_fails_on_is_named_alone(monkeypatch):
    model, processor = llava()
    images = type(processor.image_processor)
    call = images.__call__

    def fails(self, pictures, *args, **kwargs):
        if pictures[0][0].getpixel((9, 9)) == MIXED[5]["images"][0].getpixel((9, 9)) or len(pictures) > 1:
            raise IndexError("no such pixel")
        return call(self, pictures, *args, **kwargs)

    monkeypatch.setattr(images, "__call__", fails)
    with pytest.raises(ValueError, match=r"^record 'r5': LlavaProcessor failed on the question: IndexError"):
        answers(model, processor, [MIXED[0], MIXED[5], MIXED[1]])


def test_batch_size_is_a_whole_number():
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size"):
            answers(None, None, [], batch_size=wrong)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "internvl", "smolvlm", "gemma3", "mistral3", "mllama"])
def test_rows_of_a_batch_are_padded_on_the_left_and_else_as_alone(family):
    processor = getattr(processors, family)()
    model = SimpleNamespace(device="cpu", dtype=torch.float32)
    prompts = [prompt_of(processor, MIXED[at], "") for at in (0, 4, 3)]
    batch = _batch(model, processor, prompts)
    assert batch["attention_mask"][:, -1].all()
    assert not batch["attention_mask"].all()
    for row, prompt in enumerate(prompts):
        alone = _batch(model, processor, [prompt])
        length = alone["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "cross_attention_mask"):
            if name in batch and name in alone:
                assert torch.equal(batch[name][row, -length:], alone[name][0]), name
        assert not batch["attention_mask"][row, :-length].any()
        if "cross_attention_mask" in batch:
            assert not batch["cross_attention_mask"][row, :-length].any()
            assert bool(prompt.images) == bool(batch["cross_attention_mask"][row].any())
