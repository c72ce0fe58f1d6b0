"""What messages say beside role and content is honoured, or named, on both ways in."""

import datasets
import pytest
import torch

from seecal import VisionCollator, load_records
from seecal.data.collators.conversation import NoLabel
from seecal.data.message_keys import KEYS_PART, holds_image, is_learnt, packed, unpacked
from seecal.data.paths import RecordError
from tests.support.processors import qwen2_5_vl
from tests.support.tiny import MARKED_TEMPLATE, PLAIN_TEMPLATE, tiny_image, tiny_llava_processor

CALL = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
WRITES_ALL = (
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.name }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{% for part in m.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}<|end|>\n{% endfor %}"
)


def user(text="What is it?", **keys):
    return {"role": "user", "content": text, **keys}


def answer(text, **keys):
    return {"role": "assistant", "content": text, **keys}


def learnt(collator, record):
    """The label text of each run of labels, given directly and through load_records; they have to agree."""
    direct = collator([record])
    loaded = collator([load_records([record])[0]])
    assert direct.keys() == loaded.keys()
    assert all(torch.equal(direct[key], loaded[key]) for key in direct)
    labels = direct["labels"][0]
    starts = ((labels != -100).int().diff(prepend=torch.zeros(1, dtype=torch.int)) == 1).cumsum(0)
    return [
        collator.tokenizer.decode(labels[(labels != -100) & (starts == run + 1)]) for run in range(int(starts.max()))
    ]


@pytest.fixture(params=[PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
def collator(request):
    return VisionCollator(tiny_llava_processor(request.param))


OFF = {
    "ms-swift": {"loss": False},
    "OpenAI": {"weight": 0},
    "axolotl": {"train": False},
    "a number": {"loss": 0.0},
}


@pytest.mark.parametrize("name", OFF)
def test_turns_marked_not_to_be_learnt_are_not(collator, name):
    chat = [user(), answer("It is bad.", **OFF[name]), user(), answer("It is red.")]
    assert learnt(collator, {"id": "a", "messages": chat}) == ["It is red.<|end|>"]
    other_first = [user(), answer("It is red."), user(), answer("It is bad.", **OFF[name])]
    assert learnt(collator, {"id": "a", "messages": other_first}) == ["It is red.<|end|>"]


def test_turns_marked_to_be_learnt_are(collator):
    chat = [user(loss=False), answer("It is.", weight=1), user(), answer("It is red.", train=True, loss=True)]
    assert learnt(collator, {"messages": chat, "id": "a"}) == ["It is.<|end|>", "It is red.<|end|>"]


def test_turns_of_other_formats_too(collator):
    chat = [
        {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "It is bad.", "loss": False},
        {"from": "human", "value": "What?"}, {"from": "gpt", "value": "It is red."},
    ]  # fmt: skip
    record = {"id": "a", "conversations": chat, "image": tiny_image("red")}
    assert learnt(collator, record) == ["It is red.<|end|>"]
    pair = {"id": "a", "prompt": [user()], "completion": [answer("a", weight=0), user(), answer("b")]}
    assert learnt(collator, pair) == ["b<|end|>"]


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([user(), answer("a", weight=0.5)], "key 'weight': 0.5 is neither true .1. nor false"),
        ([user(), answer("a", loss="no")], "key 'loss': 'no' is neither"),
        ([user(), answer("a", loss=True, weight=0)], "keys 'loss', 'weight' of one message contradict"),
        ([user(loss=True), answer("a")], "key 'loss': it asks for learning the user turn"),
        ([user(), answer("a", images=["a.png"])], "key 'images' of a message: images stand under"),
        ([user(videos=["a.mp4"]), answer("a")], "key 'videos' of a message"),
    ],
)
def test_keys_of_messages_that_are_refused(collator, chat, reason):
    record = {"id": "a7", "messages": chat}
    for way in (collator, load_records):
        with pytest.raises(ValueError, match=f"record 'a7'.*{reason}"):
            way([record])


def test_nothing_left_to_learn(collator):
    record = {"id": "a7", "messages": [user(), answer("a", loss=False)]}
    with pytest.raises(NoLabel, match=r"record 'a7': no label: its 'loss', 'weight' or 'train' keys leave no"):
        collator([record])
    with pytest.raises(ValueError, match=r"record 'a7'.*no assistant turn that is learnt"):
        load_records([record])


def test_the_last_turn_only():
    chat = [user(), answer("It is."), user(), answer("It is red.")]
    for template in (PLAIN_TEMPLATE, MARKED_TEMPLATE):
        last = VisionCollator(tiny_llava_processor(template), train_on="last")
        assert learnt(last, {"id": "a", "messages": chat}) == ["It is red.<|end|>"]
        assert learnt(last, {"id": "a", "messages": [user(), answer("It is red.")]}) == ["It is red.<|end|>"]
        with pytest.raises(NoLabel, match=r"train_on='last'"):
            last([{"id": "a", "messages": [*chat[:3], answer("It is red.", loss=False)]}])
    with pytest.raises(ValueError, match=r"train_on='first': expected one of all, last"):
        VisionCollator(tiny_llava_processor(), train_on="first")


def test_a_template_whose_markers_enclose_pieces_of_a_turn():
    """Which of its marks belong to the last turn is told by the words, not by counting."""
    pieces = MARKED_TEMPLATE.replace("{% generation %}", "{% generation %}a{% endgeneration %} {% generation %}")
    last = VisionCollator(tiny_llava_processor(pieces), train_on="last")
    found = learnt(last, {"id": "a", "messages": [user(), answer("It is."), user(), answer("It is red.")]})
    assert "".join(found).count("It is") == 1
    assert found[-1].strip().startswith("It is red.")


def test_keys_that_the_template_writes(caplog):
    collator = VisionCollator(tiny_llava_processor(WRITES_ALL))
    chat = [user(name="b"), answer("It is red.", reasoning_content="a"), user(name="c"), answer(None, tool_calls=CALL)]
    assert learnt(collator, {"id": "a", "messages": chat}) == ["(a)It is red.<|end|>", "[look]<|end|>"]
    keys = "'name of a message', 'reasoning_content of a message', 'tool_calls of a message'"
    lost = "and are lost where it does not write them (in 1, 1, 1 of 1 records)"
    assert f"the data set: the keys {keys} go to the chat template, {lost}" in caplog.text
    assert "is not used" not in caplog.text, "the collator has nothing to say"


def test_keys_that_it_does_not_write_are_named_once(caplog):
    collator = VisionCollator(tiny_llava_processor())
    chat = [user(name="b"), answer("It is red.", reasoning_content="a", mood="good")]
    for _ in range(2):
        assert learnt(collator, {"id": "a", "messages": chat}) == ["It is red.<|end|>"]
    for key in ("name", "reasoning_content", "mood"):
        assert caplog.text.count(f"its key {key} of a message is not used") == 1


def test_keys_of_records_and_parts_are_named_once(caplog):
    collator = VisionCollator(tiny_llava_processor())
    part = {"type": "text", "text": "What?", "cache_control": "a"}
    record = {"id": "a", "messages": [user([part]), answer("It is red.")], "model": "x", "weights": None, "source": "b"}
    learnt(collator, record)
    assert (
        caplog.text.count("its key model is not used")
        == caplog.text.count("its key cache_control of a part is not")
        == 1
    )
    assert "key source" not in caplog.text, "a column that seecal.mix adds"
    keys = "'cache_control of a part', 'model', 'source'"
    assert f"left out the keys {keys}, which messages has no use for (in 1, 1, 1 of 1 records)" in caplog.text


def test_a_tool_answers_calls_only():
    tool = {"role": "tool", "content": "blue", "tool_call_id": "1"}
    chat = [user(), answer("a", tool_calls=CALL), tool, answer("It is blue.")]
    assert learnt(VisionCollator(tiny_llava_processor()), {"id": "a", "messages": chat}) == [
        "a<|end|>",
        "It is blue.<|end|>",
    ]
    with pytest.raises(ValueError, match=r"key 'role': 'tool' is not one of system, user, assistant"):
        load_records([{"messages": [user(), tool, answer("a")]}])


def test_loaded_records_keep_their_keys_wherever_they_go(tmp_path):
    chat = [user(), answer("It is bad.", loss=False), user(), answer("It is red.")]
    data = load_records([{"id": "a", "messages": chat}, {"id": "b", "messages": [user(), answer("b")]}])
    data.save_to_disk(tmp_path / "saved")
    again = load_records(tmp_path / "saved")
    assert list(again) == list(data) == list(load_records(list(data)))
    assert data[0]["messages"][1]["content"][-1] == {"type": KEYS_PART, "text": '{"loss": false}'}
    assert [part["type"] for message in data[1]["messages"] for part in message["content"]] == ["text", "text"]
    in_arrow = datasets.Dataset.from_list([{"messages": chat}, {"messages": [user(), answer("b")]}])  # Nones everywhere
    collator = VisionCollator(qwen2_5_vl())
    for rows in (list(data), list(in_arrow)):
        labels = [collator.tokenizer.decode(row[row != -100]) for row in collator(rows)["labels"]]
        assert [text.replace("<|im_end|>", "").strip() for text in labels] == ["It is red.", "b"]


def test_packing_and_its_errors():
    parts = [{"type": "text", "text": "a"}]
    message = {"role": "user", "content": packed(parts, {"name": "é", "n": 1})}
    assert unpacked(message) == {"role": "user", "content": parts, "name": "é", "n": 1}
    assert packed(parts, {}) is parts
    with pytest.raises(RecordError, match=r"keys 'a' of a message cannot be kept"):
        packed(parts, {"a": b"bytes"})
    with pytest.raises(RecordError, match=r"holds no object in JSON"):
        unpacked({"role": "user", "content": [{"type": KEYS_PART, "text": "[]"}]})
    assert is_learnt({"role": "assistant", "loss": None})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a.jpg", True), ("folder/b.PNG", True), (["a.webp", "b.webp"], True), ({"bytes": b"a", "path": None}, True),
        (b"\xff\xd8\xff\xe0", True), (tiny_image("red"), True), ("data:image/png;base64,aaaa", True),
        ("http://host/a.jpg", False), ("a\nb.jpg", False), ("a jpg", False), (7, False), ([], False), (b"abc", False),
        ({"path": None, "bytes": None}, False), ("", False), ({"a": 1}, False),
    ],
)  # fmt: skip
def test_what_holds_an_image(value, expected):
    assert holds_image(value) is expected
