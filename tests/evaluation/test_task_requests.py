"""lmms-eval's requests as records, without lmms-eval: batches, order, stops, places of images; no failure is an answer."""

import logging
from types import SimpleNamespace

import pytest
from PIL import Image

from seecal.evaluation.task_requests import DEFAULT_MAX_NEW_TOKENS, Settings, answered, cut, record_of, settings_of
from seecal.models.generate import answers
from seecal.recipes.tiny import tiny_image, tiny_llava, tiny_llava_processor


def request(number, text, settings=None, task="colours", images=0):
    """One request for document ``number``, whose prompt is ``text``."""

    def messages(document):
        content = [{"type": "image", "url": tiny_image("red")} for _ in range(images)]
        return [{"role": "user", "content": [*content, {"type": "text", "text": document}]}]

    settings = {"max_new_tokens": 8, "temperature": 0} if settings is None else settings
    return SimpleNamespace(args=(text, messages, settings, number, task, "test"))


def documents_of(texts, task="colours"):
    return {task: {"test": texts}}


class Asked:
    """Answers with the question's own words, and keeps what it was asked."""

    def __init__(self, answer=None):
        self.batches, self.settings, self.answer = [], [], answer

    def __call__(self, records, settings):
        texts = [record["messages"][0]["content"][-1]["text"] for record in records]
        self.batches.append(texts)
        self.settings.append(settings)
        return [self.answer(text) if self.answer else f"to {text}" for text in texts]


def test_answers_come_in_the_order_of_the_requests_the_longest_asked_first():
    texts = ["aa", "a", "aaaa", "aaa", "aaaaa"]
    asked = Asked()
    found = answered([request(at, text) for at, text in enumerate(texts)], documents_of(texts), asked, batch_size=2)
    assert found == [f"to {text}" for text in texts]
    assert asked.batches == [["aaaaa", "aaaa"], ["aaa", "aa"], ["a"]]


def test_requests_that_are_generated_differently_are_not_mixed():
    texts = ["a", "b", "c", "d"]
    settings = [
        {"max_new_tokens": 8},
        {"max_new_tokens": 9},
        {"max_new_tokens": 8},
        {"max_new_tokens": 8, "num_beams": 3},
    ]
    asked, told = Asked(), []
    requests = [request(at, text, settings[at]) for at, text in enumerate(texts)]
    assert answered(requests, documents_of(texts), asked, batch_size=4, tell=told.append) == [
        f"to {text}" for text in texts
    ]
    assert asked.batches == [["a", "c"], ["b"], ["d"]]
    assert told == [2, 1, 1]
    assert [one.max_new_tokens for one in asked.settings] == [8, 9, 8]
    assert asked.settings[2].generation["num_beams"] == 3


def test_tasks_share_a_batch_each_with_its_own_documents():
    asked = Asked()
    requests = [request(0, "x", task="one"), request(0, "y", task="two")]
    found = answered(requests, {"one": {"test": ["first"]}, "two": {"test": ["second"]}}, asked, batch_size=2)
    assert found == ["to first", "to second"]
    assert asked.batches == [["first", "second"]]


def test_nothing_asked_is_nothing_answered():
    assert answered([], {}, Asked(), batch_size=4) == []


@pytest.mark.parametrize(
    ("answer", "until", "expected"),
    [
        ("red\nUSER: and now?", ["USER:"], "red"),
        ("red. It is. red.", [".", "is"], "red"),
        ("\n\nred", ["\n"], "red"),
        (" red ", [], "red"),
        ("USER: red", ["USER:"], ""),
        ("red", ["blue"], "red"),
    ],
)
def test_an_answer_ends_before_the_first_stop(answer, until, expected):
    assert cut(answer, until) == expected


@pytest.mark.parametrize(
    ("given", "sampled", "generation"),
    [
        ({}, False, {}),
        ({"temperature": 0, "top_p": 0.9, "do_sample": True}, False, {}),
        ({"temperature": 0.7, "top_p": 0.9}, True, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False}, False, {}),
        ({"do_sample": True}, True, {}),
        ({"num_beams": 4, "top_p": None, "temperature": None}, False, {"num_beams": 4}),
    ],
)
def test_what_generate_gets(given, sampled, generation):
    assert settings_of(given).generation == {"do_sample": sampled, **generation}


def test_stops_and_length():
    assert settings_of({"until": "USER:"}) == Settings(DEFAULT_MAX_NEW_TOKENS, ("USER:",), {"do_sample": False})
    assert settings_of({"until": ["\n\n"]}).until == ()  # lmms-eval fills this in
    assert settings_of({"until": ["\n\n", "", "Q:"], "max_new_tokens": 3}).until == ("\n\n", "Q:")
    assert settings_of({"image_aspect_ratio": "pad"}).ignored == ("image_aspect_ratio",)


@pytest.mark.parametrize(
    "given", [{"until": 3}, {"until": ["a", None]}, {"max_new_tokens": 0}, {"max_new_tokens": "9"}]
)
def test_settings_that_make_no_sense_name_the_task(given):
    with pytest.raises(ValueError, match="task colours: "):
        answered([request(0, "a", given)], documents_of(["a"]), Asked(), batch_size=1)


def test_what_a_task_sets_in_vain_is_said_once(caplog):
    texts = ["a", "b"]
    requests = [request(at, text, {"image_aspect_ratio": "pad"}) for at, text in enumerate(texts)]
    with caplog.at_level(logging.WARNING):
        answered(requests, documents_of(texts), Asked(), batch_size=1)
    assert [line.getMessage() for line in caplog.records] == [
        "task colours: its generation_kwargs image_aspect_ratio mean nothing here"
    ]


def parts_of(content):
    record = record_of([{"role": "user", "content": content}], "t, doc_id 0")
    parts = record["messages"][0]["content"]
    return ["image" if part["type"] == "image" else part["text"] for part in parts], len(record["images"])


IMAGE = {"type": "image", "url": Image.new("RGB", (4, 4))}


@pytest.mark.parametrize(
    ("images", "text", "expected"),
    [
        (1, "What?", ["image", "What?"]),
        (0, "What?", ["What?"]),
        (2, "Which?", ["image", "image", "Which?"]),
        (1, "Question: <image>\nWhat?", ["Question: ", "image", "\nWhat?"]),  # MMT-Bench
        (2, "Left <image> right <image>: which?", ["Left ", "image", " right ", "image", ": which?"]),
        (3, "Images: <image>\nWhich?", ["Images: ", "image", "image", "image", "\nWhich?"]),
        (0, "What does <image> mean?", ["What does <image> mean?"]),
    ],
)
def test_an_image_goes_where_the_prompt_marks_its_place(images, text, expected):
    assert parts_of([IMAGE] * images + [{"type": "text", "text": text}]) == (expected, images)


def test_a_text_alone_is_a_content_too():
    assert parts_of("What?") == (["What?"], 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([IMAGE] * 3 + [{"type": "text", "text": "<image> or <image>?"}], "3 images, but 2 marks"),
        ([{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "What?"}], "a part of type 'video'"),
        ([{"type": "audio", "url": {}}], "a part of type 'audio'"),
        ([{"type": "image", "url": "not/there.png"}], "no image at not/there.png"),
        ([{"type": "image"}], "an image part without an image"),
    ],
)
def test_what_cannot_be_asked_names_task_and_document(content, message):
    with pytest.raises(ValueError, match=message) as raised:
        record_of([{"role": "user", "content": content}], "mmt_val, doc_id 7")
    assert str(raised.value).startswith("mmt_val, doc_id 7: ")


def test_a_task_that_fails_to_put_its_question_is_named():
    def broken(document):
        raise KeyError("question")

    asked = SimpleNamespace(args=("a", broken, {}, 0, "colours", "test"))
    with pytest.raises(
        ValueError, match="colours, doc_id 0: the task failed to put its question: KeyError: 'question'"
    ):
        answered([asked], documents_of(["a"]), Asked(), batch_size=1)


def test_answers_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match="colours, doc_id 0: 0 answers to 1 question"):
        answered([request(0, "a")], documents_of(["a"]), lambda records, settings: [], batch_size=1)


# ---- With a model ----


@pytest.fixture(scope="module")
def model():
    return tiny_llava().eval(), tiny_llava_processor()


def test_a_batch_of_four_answers_as_one_at_a_time(model):
    texts = ["What colour is it?" + " b" * at for at in (5, 0, 3, 1, 4, 2)]
    requests = [request(at, text, images=(1, 0, 2, 1, 1, 0)[at]) for at, text in enumerate(texts)]

    def ask(records, settings):
        return answers(*model, records, max_new_tokens=settings.max_new_tokens, batch_size=len(records))

    single = answered(requests, documents_of(texts), ask, batch_size=1)
    assert answered(requests, documents_of(texts), ask, batch_size=4) == single
    assert len(set(single)) > 2, "all answers alike would hide a wrong order"


@pytest.mark.parametrize("fault", [RuntimeError("CUDA error"), IndexError("list index out of range")])
def test_a_failure_of_the_model_is_no_empty_answer(model, monkeypatch, fault):
    network, processor = model

    def fail(**batch):
        raise fault

    monkeypatch.setattr(network, "generate", fail)
    with pytest.raises(ValueError, match=r"colours, doc_id 0.*failed to answer") as raised:
        answered(
            [request(0, "What?", images=1)],
            documents_of(["What?"]),
            lambda records, settings: answers(network, processor, records),
            batch_size=4,
        )
    assert str(fault) in str(raised.value)


def test_an_image_that_is_damaged_is_no_empty_answer(model, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG cut off")
    content = [{"type": "image", "url": str(tmp_path / "a.png")}, {"type": "text", "text": "What?"}]
    asked = SimpleNamespace(args=("a", lambda _: [{"role": "user", "content": content}], {}, 5, "colours", "test"))
    with pytest.raises(ValueError, match="colours, doc_id 5"):
        answered([asked], documents_of(range(6)), lambda records, settings: answers(*model, records), batch_size=4)
