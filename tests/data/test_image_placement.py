"""Images stand where they are meant, and in the same places whether records are loaded or given to a collator directly."""

import functools

import pytest
import torch

from seecal import VisionCollator, load_records
from seecal.data.image_placement import images_in_order, parts_of, place_first
from seecal.data.paths import RecordError
from tests.support import processors
from tests.support.tiny import tiny_image, tiny_llava_processor

# What every family's template takes; in the released ones of Mistral 3 images go before the texts of their message
FAMILIES = ["llava_next", "qwen2_5_vl", "internvl", "gemma3", "mistral3", "idefics3"]


@functools.cache
def processor_of(family):
    return getattr(processors, family)()


def user(content):
    return {"role": "user", "content": content}


def answer(content):
    return {"role": "assistant", "content": content}


def text(words):
    return {"type": "text", "text": words}


IMAGE = {"type": "image"}
SPEAKS = "an answer in parts speaks of the mark"
# (messages as they come, the parts of each message, number of images)
CASES = {
    "LLaVA's way": (
        [user("<image>\nWhat is it?"), answer("It is red.")],
        [[IMAGE, text("What is it?")], [text("It is red.")]],
        1,
    ),
    "behind the text": (
        [user("What is it?\n<image>"), answer("It is red.")],
        [[text("What is it?"), IMAGE], [text("It is red.")]],
        1,
    ),
    "inside the text": (
        [user("Is <image> or <image> it?"), answer("It is.")],
        [[text("Is "), IMAGE, text(" or "), IMAGE, text(" it?")], [text("It is.")]],
        2,
    ),
    "only in a later turn": (
        [user("What?"), answer("It is."), user("<image>What is it?"), answer("It is red.")],
        [[text("What?")], [text("It is.")], [IMAGE, text("What is it?")], [text("It is red.")]],
        1,
    ),
    "in two turns": (
        [user("<image>What?"), answer("It is."), user("It is?\n<image>"), answer("It is red.")],
        [[IMAGE, text("What?")], [text("It is.")], [text("It is?"), IMAGE], [text("It is red.")]],
        2,
    ),
    "nowhere": (
        [{"role": "system", "content": "It is."}, user("What is it?"), answer("It is red."), user("a"), answer("b")],
        [[text("It is.")], [IMAGE, IMAGE, text("What is it?")], [text("It is red.")], [text("a")], [text("b")]],
        2,
    ),
    SPEAKS: (
        [user([IMAGE, text("What?")]), answer([text("HTML has no <image>.")])],
        [[IMAGE, text("What?")], [text("HTML has no <image>.")]],
        1,
    ),
    "no image and no mark": ([user("What?"), answer("It is.")], [[text("What?")], [text("It is.")]], 0),
}


def images(count):
    return [tiny_image(colour, (40, 40)) for colour in ["red", "blue", "green"][:count]]


def without_nulls(messages):
    """A loaded record's messages: Arrow gives each part all keys."""

    def plain(part):
        return {key: value for key, value in part.items() if value is not None}

    return [{**message, "content": [plain(part) for part in message["content"]]} for message in messages]


@pytest.mark.parametrize("name", CASES)
def test_the_parts(name):
    messages, expected, count = CASES[name]
    placed = place_first(messages, images(count))
    assert [parts_of(message) for message in placed] == expected


# In two families the mark is the image token itself, which no text may hold
PAIRS = [
    (family, name)
    for family in FAMILIES
    for name in CASES
    if family not in ("llava_next", "idefics3") or name != SPEAKS
]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_both_ways_in_give_the_same_batch(family, name):
    """In families whose image token is another than the mark, which used to stay in the text as six letters."""
    messages, expected, count = CASES[name]
    collator = VisionCollator(processor_of(family))
    record = {"id": "a", "messages": messages, "images": images(count)}
    (loaded,) = load_records([record])
    assert [message["content"] for message in without_nulls(loaded["messages"])] == expected
    direct, through = collator([record]), collator([loaded])
    assert direct.keys() == through.keys()
    for key in direct:
        assert torch.equal(direct[key], through[key]), key
    words = collator.tokenizer.decode(direct["input_ids"][0])
    assert words.count("<image>") == int(name == SPEAKS) or family in ("llava_next", "idefics3")


def test_images_follow_their_marks():
    """Each placeholder gets the image of its place, also where the mark stands in the second turn only."""
    collator = VisionCollator(tiny_llava_processor())
    messages = [user("<image>What?"), answer("a"), user("b<image>"), answer("c")]
    record = {"messages": messages, "images": [tiny_image("green"), tiny_image("red")]}
    means = collator([record])["pixel_values"].mean((2, 3))
    assert [int(one.argmax()) for one in means] == [1, 0]


@pytest.mark.parametrize(
    ("indices", "colours"), [([0, 1], [0, 2]), ([1, 0], [2, 0]), ([0, 0], [0, 2]), ([None, 0], [0, 2])]
)
def test_a_place_may_say_which_image_stands_there(indices, colours):
    """As published sets of several images write it; numbers that are not those of all images say nothing."""
    parts = [{"type": "image", "index": index} for index in indices]
    record = {
        "id": "a",
        "messages": [user([*parts, text("What?")]), answer("a")],
        "images": [tiny_image("red"), tiny_image("blue")],
    }
    collator = VisionCollator(tiny_llava_processor())
    for batch in (collator([record]), collator([load_records([record])[0]])):
        assert [int(one.argmax()) for one in batch["pixel_values"].mean((2, 3))] == colours


def test_a_part_may_bring_its_own_image(tmp_path):
    tiny_image("blue").save(tmp_path / "blue.png")
    collator = VisionCollator(tiny_llava_processor())
    paths = {"type": "image", "path": str(tmp_path / "blue.png")}
    for own in ({"type": "image", "image": tiny_image("blue")}, paths):
        for messages, given in (
            ([user([own, text("What?")]), answer("a")], []),
            ([user("What?"), answer("a"), user([own, text("b")]), answer("c")], []),
            ([user([text("What?"), IMAGE, own]), answer("a")], [tiny_image("red")]),
            ([user("What?"), answer("a"), user([own, text("b")]), answer("c")], [tiny_image("red")]),
        ):
            batch = collator([{"messages": messages, "images": given}])
            colours = [int(one.argmax()) for one in batch["pixel_values"].mean((2, 3))]
            assert colours == [0] * len(given) + [2]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (user(None), "the user turn has none"),
        (user(5), "key 'content': 5 is neither"),
        (user([{"type": "audio"}]), "a part of type 'audio'"),
        (user([text(5)]), "key 'text': 5 is not a text"),
        (user(["a"]), "part 'a' is not an object"),
        (user([{"type": "image", "url": "http://a/b.png"}]), "is a URL"),
        (user("\ud800"), "half a surrogate pair"),
    ],
)
def test_what_is_refused_alike_on_both_ways(message, reason):
    record = {"id": "a7", "messages": [message, answer("It is.")], "images": []}
    with pytest.raises(RecordError, match=reason):
        parts_of(message)
    for way in (VisionCollator(tiny_llava_processor()), load_records):
        with pytest.raises(ValueError, match=f"record 'a7'.*{reason}"):
            way([record])


@pytest.mark.parametrize(("marks", "count"), [(0, 1), (1, 0), (2, 1), (1, 2)])
def test_another_number_of_images_than_of_marks(marks, count):
    record = {"id": "a7", "messages": [user([IMAGE] * marks + [text("a")]), answer("b")], "images": images(count)}
    says = f"{count} image{'s' * (count != 1)}, but {marks} placeholder{'s' * (marks != 1)}"
    with pytest.raises(RecordError, match=says):
        images_in_order([{"content": parts_of(message)} for message in record["messages"]], record["images"])
    for way in (VisionCollator(tiny_llava_processor()), functools.partial(load_records, image_root=".")):
        with pytest.raises(ValueError, match=f"record 'a7'.*{says}"):
            way([record])


def test_a_mark_without_an_image_is_told_on_both_ways():
    record = {"id": "a7", "messages": [user("What is <image>?"), answer("a")], "images": []}
    for way in (VisionCollator(processor_of("qwen2_5_vl")), load_records):
        with pytest.raises(ValueError, match=r"record 'a7'.*0 images, but 1 placeholder \(<image>\).*in a part"):
            way([record])
