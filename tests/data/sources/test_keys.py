"""Whatever is in a row is used, refused by name, or said once with its count; what has one meaning is understood."""

import base64
import codecs
import json
from collections import Counter

import datasets
import numpy as np
import pytest

from seecal import FORMATS, Format, load_records
from seecal.data.paths import RecordError
from seecal.data.sources.formats import KEYS, check_keys
from tests.support.sources import images_in, messages, png, row, turn, write_jsonl
from tests.support.tiny import tiny_image

CHAT = messages([("What?", "It is.")], str)
ROWS = {
    "llava": {"image": "red.png", "conversations": turn()},
    "sharegpt": {"images": ["red.png"], "system": "s", "conversations": turn()},
    "messages": {"messages": CHAT, "images": ["red.png"]},
    "prompt_completion": {"prompt": "a", "completion": "b", "image": "red.png"},
    "captions": {"file_name": "red.png", "text": "a", "prompt": "b"},
}


@pytest.fixture
def folder(tmp_path):
    return images_in(tmp_path / "images")


# ---- Unknown keys ----


@pytest.mark.parametrize("name", FORMATS)
def test_media_and_unknown_images_are_refused_in_every_format(folder, name):
    assert set(ROWS) == set(FORMATS)
    load_records([ROWS[name]], image_root=folder)
    for key, value in {
        "video": "a.mp4", "videos": ["a.mp4"], "audio": {"path": "a.wav"}, "audios": [b"a"], "tools": [{"name": "look"}],
        "image_path": "red.png", "image_2": tiny_image("red"), "mask": ["red.png"], "depth": png(),
        "thumbnail": {"bytes": png(), "path": None},
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"record 'a7' \(entry 0\): key '{key}'"):
            load_records([{"id": "a7", **ROWS[name], key: value}], image_root=folder)
        assert len(load_records([{**ROWS[name], key: value}], image_root=folder, columns={key: None})) == 1
        empty = {key: type(value)()} if isinstance(value, (str, list, dict)) else {key: None}
        assert len(load_records([{**ROWS[name], **empty}], image_root=folder)) == 1


@pytest.mark.parametrize("name", FORMATS)
def test_other_keys_are_said_with_their_count(folder, name, caplog):
    rows = [{**ROWS[name], "score": 1, "url": "http://host/a.jpg"}, {**ROWS[name], "score": 2}, ROWS[name]]
    load_records(rows, image_root=folder)
    assert (
        caplog.text.count(f"left out the keys 'score', 'url', which {name} has no use for (in 2, 1 of 3 records)") == 1
    )


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.where} {key.names[0]} {key.fate}")
def test_the_table_is_what_happens(key):
    """Each row of the table of keys, in the formats that it names, through the check that is made of it."""
    if key.where != "row" or key.others:
        return
    for name in key.formats or FORMATS:
        for key_name in key.names:
            unused = Counter()
            one = {key_name: "a value"}
            if key.fate == "refused":
                with pytest.raises(RecordError, match=f"key '{key_name}'"):
                    check_keys(one, FORMATS[name].uses, unused)
            else:
                check_keys(one, FORMATS[name].uses, unused)
                assert unused == ({key_name: 1} if key.fate == "counted" else {})


def test_a_format_of_ones_own_says_nothing_of_its_keys(monkeypatch, caplog):
    own = Format("q, a", lambda keys: "q" in keys, lambda row: (messages([(row["q"], row["a"])], str), []))
    monkeypatch.setitem(FORMATS, "own", own)
    load_records([{"q": "a", "a": "b", "picture": "a.png"}])
    assert not caplog.text


def test_two_keys_for_one_thing_are_refused(folder):
    for extra, keys in (({"caption": "b"}, "'text' and 'caption'"), ({"image": "red.png"}, "'file_name' and 'image'")):
        with pytest.raises(ValueError, match=f"keys {keys} are both there"):
            load_records([{**ROWS["captions"], **extra}], image_root=folder)


# ---- Marks of other media ----

MARKS = ["<video>", "<audio>", "<|video|>", "<|audio_1|>", "<img>pic.jpg</img>", "<|image_1|>", "<image 1>", "<Image>",
         "<IMAGE>", "<ImageHere>", "<image_placeholder>", "<video>a.mp4</video>", "<speech>", "<|image_pad|>"]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("name", ["llava", "messages", "prompt_completion", "captions"])
def test_marks_that_would_be_trained_as_words(folder, mark, name):
    text = f"{mark}\nWhat?"
    rows = {
        "llava": {"conversations": turn(text)},
        "messages": {"messages": messages([(text, "b")], str)},
        "prompt_completion": {"prompt": text, "completion": "b"},
        "captions": {"file_name": "red.png", "prompt": text, "text": "b"},
    }
    with pytest.raises(ValueError, match=r"has the mark"):  # its image goes before the text
        load_records([{"messages": messages([(text, "b")], str), "image": "red.png"}], image_root=folder)
    with pytest.raises(ValueError, match=r"record 'a7' .*a text has the mark '<.*would be trained as words") as caught:
        load_records([{"id": "a7", **rows[name]}], image_root=folder)
    assert ("Write <image>" in str(caught.value)) == ("im" in mark.lower()[:4])


@pytest.mark.parametrize(
    "text",
    [
        "In HTML, <video src='a'> and <audio controls> play.", "Use <video> ... </video> there.", "What is `<video>`?",
        "```\n<audio>\n```", "a < b and c > d", "<img src='a.jpg'>", "<videos>", "<imagery>",
    ],
)  # fmt: skip
def test_texts_that_only_speak_of_media(text):
    assert load_records([{"conversations": turn(text)}])[0]["messages"][0]["content"] == [
        {"type": "text", "text": text}
    ]


def test_marks_in_answers_and_in_parts_are_words():
    load_records([{"conversations": turn("What?", "It is <video>.")}])
    load_records([{"messages": messages([("<video>", "b")], lambda text: [{"type": "text", "text": text}])}])


# ---- columns ----


def test_other_names_for_keys(folder):
    rows = [{"picture": "red.png", "chat": turn(), "key": "a"}, {"picture": "blue.png", "chat": turn(), "key": "b"}]
    names = {"picture": "image", "chat": "conversations", "key": "id"}
    expected = [{"id": one["key"], "image": one["picture"], "conversations": one["chat"]} for one in rows]
    for streaming in (False, True):
        data = load_records(rows, image_root=folder, columns=names, streaming=streaming)
        assert list(data) == list(load_records(expected, image_root=folder))
    with pytest.raises(ValueError, match=r"Name the keys with columns="):
        load_records(rows, image_root=folder)


def test_columns_that_cannot_be(folder):
    with pytest.raises(
        ValueError, match=r"columns names 'picture', which no record has. It maps the data's keys to ours"
    ):
        load_records([row()], image_root=folder, columns={"picture": "image"})
    with pytest.raises(
        ValueError, match=r"record 'dataset:0'.*columns: 'b' is called 'image', and there is a key 'image'"
    ):
        load_records([row(b="red.png")], image_root=folder, format="llava", columns={"b": "image"})


# ---- What can mean one thing only ----


def same(first, second):
    assert list(first) == list(second)


@pytest.mark.parametrize(
    "written",
    [
        {"conversations": json.dumps(turn("What?"))},
        {"conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"role": "human", "content": "What?"}, {"role": "gpt", "content": "b"}]},
        {"conversations": {"from": ["human", "gpt"], "value": ["What?", "b"]}},
        {"messages": json.dumps(messages([("What?", "b")], str))},
        {"messages": turn("What?")},
        {"messages": messages([("What?", "b")], str), "image": ""},
        {"messages": messages([("What?", "b")], str), "images": ["", " "]},
        {"messages": messages([("What?", "b")], str), "images": "[]"},
        {"messages": messages([("What?", "b")], str), "images": " [ ]\n"},
        {"messages": messages([("What?", "b")], str), "system": ""},
        {"messages": messages([("What?", "b")], str), "system": None},
        {"conversations": turn("What?"), "system": " \n", "tools": "", "history": []},
        {"messages": messages([("What?", "b")], str), "image": float("nan")},
        {"messages": messages([("What?", "b")], str), "id": 12.0},
        {"messages": messages([("What?", "b")], str), "id": float("nan")},
    ],
    ids=str,
)
def test_understood(written):
    name = "12" if written.get("id") == 12 else "a" if "id" not in written else "dataset:0"
    plain = {"id": name, "messages": messages([("What?", "b")], str)}
    same(load_records([{"id": "a", **written}]), [{**load_records([plain])[0], "id": name}])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("names", [["red.png"], ["red.png", "blue.png"]], ids=len)
def test_images_as_json_text(folder, names, indent):
    chat = turn("<image>" * len(names) + "a")
    objects = [{"path": name} for name in names]
    wanted = load_records([row(image=names, conversations=chat)], image_root=folder)
    for listed in (names, objects, *(objects if len(names) == 1 else [])):
        text = json.dumps(listed, indent=indent)
        same(load_records([row(image=text, conversations=chat)], image_root=folder), wanted)
    held = json.dumps([{"bytes": base64.b64encode(png((90, 90))).decode(), "path": None}], indent=indent)
    assert load_records([row(image=held)])[0]["images"] == [{"path": None, "bytes": png((90, 90))}]


def test_an_image_in_base64():
    uri = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert load_records([row(image=uri)])[0]["images"] == [{"path": None, "bytes": png()}]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"messages": str(CHAT)}, "key 'messages': .* as Python writes a list, not as JSON. Write it with json.dumps"),
        ({"messages": "[{"}, "key 'messages': '.{' is no valid JSON"),
        ({"messages": CHAT, "images": str([{"path": "red.png"}])}, "key 'images': .* as Python writes a list, not"),
        ({"messages": CHAT, "image": str({"path": "red.png"})}, "key 'image': .* as Python writes a dict, not as JSON"),
        (
            {"messages": [{"role": "system", "content": "S"}, *CHAT], "system": "T"},
            "key 'system': 'T', and the first turn is another system message. Keep one",
        ),
        ({"conversations": [{"from": "system", "value": "S"}, *turn()], "system": "T"}, "is another system message"),
        ({"messages": CHAT, "system": ["S"]}, "key 'system': .* is not a text"),
        ({"conversations": turn("What?"), "id": 12.5}, "key 'id': 12.5 is neither"),
        ({"conversations": turn(), "image": ""}, "image '' names no file"),
        ({"file_name": "red.png", "prompt": "a", "text": None, "caption": None}, "no known format|neither 'text' nor"),
        ({"text": "a", "image": []}, "no image under 'file_name', 'image' or 'images'"),
    ],
)
def test_not_understood_in_one_line(folder, bad, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        load_records([{"id": "a7", **bad}], image_root=folder)
    assert "\n" not in str(caught.value)


def test_a_system_message_beside_messages():
    data = load_records([{"system": "Be brief.", "messages": CHAT}])
    assert [message["role"] for message in data[0]["messages"]] == ["system", "user", "assistant"]
    said = [{"role": "system", "content": "Be brief."}, *CHAT]
    for text in ("Be brief.", "", " "):
        same(load_records([{"id": "dataset:0", "system": text, "messages": said}]), data)


# ---- Encodings and tables ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["d.json", "d.jsonl", "metadata.csv"])
def test_files_of_windows_and_excel(folder, encoding, name):
    words = "Ein rotes Quadrat, größer als 1. 红"
    rows = [row(image="red.png", conversations=turn("<image>What?", words)) for _ in range(3)]
    texts = {
        "d.json": json.dumps(rows, ensure_ascii=False, indent=1),
        "d.jsonl": "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows),
        "metadata.csv": "file_name,prompt,text\n" + f'red.png,What?,"{words}"\n' * 3,
    }
    (folder / name).write_bytes(texts[name].encode(encoding))
    data = load_records(folder / name)
    assert [record["messages"][1]["content"][0]["text"] for record in data] == [words] * 3
    assert not (folder / name).read_bytes().startswith(codecs.BOM_UTF8) or encoding == "utf-8-sig"


@pytest.mark.parametrize("sign", [";", "\t"])
def test_other_signs_between_fields(folder, sign):
    (folder / "metadata.csv").write_text(f'file_name{sign}text\nred.png{sign}"a{sign} b, c"\n')
    assert load_records(folder)[0]["messages"][1]["content"][0]["text"] == f"a{sign} b, c"


def test_an_empty_cell(folder):
    (folder / "metadata.csv").write_text("file_name,text\nred.png,\nblue.png,b\n")
    with pytest.raises(ValueError, match=r"\(line 2\): neither 'text' nor 'caption' is there, or its cell is empty"):
        load_records(folder)
    (folder / "d.csv").write_text(f'messages,image\n"{json.dumps(CHAT).replace(chr(34), chr(34) * 2)}",\n')
    assert len(load_records(folder / "d.csv")[0]["images"]) == 0


def test_pandas_rows(folder, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([{"id": 1, "image": "red.png", "conversations": turn()},
                              {"id": None, "image": np.nan, "conversations": turn("What?")}])  # fmt: skip
    records = load_records(frame.to_dict("records"), image_root=folder)
    assert records["id"] == ["1", "dataset:1"]
    assert [len(record["images"]) for record in records] == [1, 0]
    frame.to_parquet(tmp_path / "d.parquet")
    assert load_records(tmp_path / "d.parquet", image_root=folder)["id"] == ["1", "d.parquet:1"]
    same(load_records(datasets.Dataset.from_pandas(frame), image_root=folder)["images"], records["images"])


def test_captions_whose_prompt_marks_the_place(folder):
    write_jsonl(
        folder / "metadata.jsonl", [{"file_name": "red.png", "prompt": "Look: <image>\nWhat?", "text": "<image> it"}]
    )
    question, answer = load_records(folder)[0]["messages"]
    assert [part["text"] or part["type"] for part in question["content"]] == ["Look: ", "image", "\nWhat?"]
    assert answer["content"] == [{"type": "text", "text": "<image> it"}]
