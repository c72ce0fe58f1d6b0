"""Every format gives the same records, and a record that cannot be used is one line or one count."""

import json
import os
import pickle
import random
import re

import datasets
import pytest
import torch
from PIL import Image

from seecal.data.collator import VisionCollator
from seecal.data.formats import FORMATS
from seecal.data.images import decode_image
from seecal.data.mixture import mix
from seecal.data.records import FEATURES, split_text
from seecal.data.sources import LoadReport, load_records
from tests.sources import (
    CONVERSATIONS,
    RICH,
    SIMPLE,
    WRITERS,
    expected,
    images_in,
    llava_json,
    llava_jsonl,
    llava_rows,
    load,
    messages,
    png,
    write_json,
    write_jsonl,
)
from tests.tiny import tiny_llava_processor


@pytest.fixture(scope="module")
def collator():
    return VisionCollator(tiny_llava_processor())


@pytest.fixture
def folder(tmp_path):
    """A folder with images, and a picture outside of it."""
    (tmp_path / "secret.png").write_bytes(png())
    return images_in(tmp_path / "images")


def turn(question="<image>a", answer="b"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(**changes):
    return {"id": "r-9", "image": "red.png", "conversations": turn(), **changes}


def same(batch, other):
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


# ---- The same content in every format ----


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_batches(tmp_path, collator, name, streaming):
    contents = [SIMPLE, RICH] if name in CONVERSATIONS else [SIMPLE]
    for index, content in enumerate(contents):
        report = LoadReport()
        folder = tmp_path / str(index)
        data = load(WRITERS[name], folder, content, streaming=streaming, report=report)
        always = name == "hub_like_streaming"
        assert isinstance(data, datasets.IterableDataset if streaming or always else datasets.Dataset)
        assert data.features == FEATURES
        records = list(data)
        assert same(collator(records), collator(expected(folder, content)))
        assert (report.accepted, report.rejected, report.total) == (len(content), 0, len(content))
        assert list(data) == records, "a second pass reads the same"


def test_the_formats_are_told_apart(tmp_path):
    told = {}
    for name, writer in WRITERS.items():
        report = LoadReport()
        data = load(writer, tmp_path / name, SIMPLE, report=report)
        told[name] = report.format
        again = load(writer, tmp_path / f"{name}_named", SIMPLE, format=report.format)
        assert [one["messages"] for one in again] == [one["messages"] for one in data]
    assert set(told.values()) == set(FORMATS)
    assert {told["llava_json"], told["llava_jsonl"]} == {"llava"}
    assert {told["saved"], told["hub_like"], told["parquet"], told["in_memory"]} == {"messages"}


def test_ids_are_the_records_own_or_file_and_index(tmp_path):
    path = write_json(tmp_path / "d.json", [{"conversations": turn("a")}, {"id": 7, "conversations": turn("a")}])
    assert load_records(path)["id"] == ["d.json:0", "7"]
    assert load_records([{"messages": messages([("a", "b")])}])["id"] == ["dataset:0"]


def test_nothing_is_decoded(folder):
    (folder / "bad.png").write_bytes(b"no image")
    data = load_records(write_json(folder / "d.json", [row(image="bad.png")]))
    assert data[0]["images"] == [{"path": str(folder / "bad.png"), "bytes": None}]


def test_a_system_turn(tmp_path):
    rows = [{"system": "Be brief.", "conversations": turn("a")}]
    by_key = load_records(write_json(tmp_path / "a.json", rows))
    rows = [{"conversations": [{"from": "system", "value": "Be brief."}, *turn("a")]}]
    by_turn = load_records(write_json(tmp_path / "b.json", rows))
    assert by_key[0]["messages"] == by_turn[0]["messages"]
    assert by_key[0]["messages"][0]["role"] == "system"


def test_rows_of_different_shapes_in_one_file(folder):
    """What makes load_dataset("json") fail: a key that is a text here, a list there, and missing elsewhere."""
    rows = [*llava_rows(RICH), {"conversations": turn("a"), "image": None, "extra": {"a": [1, "b"]}}, row(id=3)]
    data = load_records(write_json(folder / "d.json", rows))
    assert [len(one["images"]) for one in data] == [1, 2, 0, 3, 0, 1]


def test_captions_without_a_prompt(folder):
    (folder / "captions.csv").write_text('file_name,caption\nred.png,"A square, red"\nblue.png,"two\nlines"\n')
    data = load_records(folder)
    assert [one["messages"][0]["content"] for one in data] == [[{"type": "image", "text": None}]] * 2
    assert [one["messages"][1]["content"][0]["text"] for one in data] == ["A square, red", "two\nlines"]


def test_images_in_the_parts_and_between(folder):
    question = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "a"}, {"type": "image"}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "b"}]
    data = load_records([{"messages": chat, "images": ["blue.png"]}], image_root=folder)
    assert [os.path.basename(one["path"]) for one in data[0]["images"]] == ["red.png", "blue.png"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", ["a"]),
        ("  a\n", ["  a\n"]),
        ("<image>\na", [None, "a"]),
        ("a\n<image>", ["a", None]),
        ("<image>\n<image>\n a ", [None, None, "a "]),
        (" a <image>\n<image> b ", [" a ", None, "\n", None, " b "]),
        ("<image>", [None]),
        (" <image> <image>\n", [None, None]),
    ],
)
def test_where_images_stand_in_a_text(text, parts):
    assert [part.get("text") for part in split_text(text)] == parts


def test_a_large_list_is_read_entry_by_entry(tmp_path):
    rows = [{"conversations": turn("é" * (index % 97), "b" * (index * 37 % 9000 + 1))} for index in range(400)]
    for indent in (None, 3):
        text = json.dumps(rows, indent=indent, ensure_ascii=indent is None)
        assert len(text) > 10 * (1 << 16)
        (tmp_path / "d.json").write_text(text, encoding="utf-8-sig")
        answers = [one["messages"][1]["content"][0]["text"] for one in load_records(tmp_path / "d.json")]
        assert answers == [one["conversations"][1]["value"] for one in rows]


def test_lines_under_the_name_of_a_list(tmp_path):
    path = write_jsonl(tmp_path / "d.json", [{"conversations": turn("a")}] * 3)
    assert len(load_records(path)) == 3


def test_streaming_by_parts_pickles_and_resumes(tmp_path):
    folder = images_in(tmp_path / "parts")
    for part in range(3):
        rows = [{"messages": messages([("a", f"{part} {index}")])} for index in range(4)]
        datasets.Dataset.from_list(rows).to_parquet(folder / f"part-{part}.parquet")
    data = load_records(folder, streaming=True)
    assert data.num_shards == 3
    ids = [one["id"] for one in pickle.loads(pickle.dumps(data))]
    assert ids == [f"part-{part}.parquet:{index}" for part in range(3) for index in range(4)]
    iterator = iter(data)
    for _ in range(5):
        next(iterator)
    state = data.state_dict()
    fresh = load_records(folder, streaming=True)
    fresh.load_state_dict(state)
    assert [one["id"] for one in fresh] == ids[5:]


def test_workers_share_the_parts(tmp_path):
    for part in range(3):
        rows = [{"messages": messages([("a", f"{part} {index}" if part else "")], str)} for index in range(4)]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"part-{part}.parquet")
    data = load_records(tmp_path, streaming=True, on_bad="skip")  # nothing of the first part can be used
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    ids = [record["id"] for record in loader]
    assert sorted(ids) == [f"part-{part}.parquet:{index}" for part in (1, 2) for index in range(4)]


def test_keys_without_a_use_are_mentioned_once(tmp_path, caplog):
    rows = [{"id": index, "conversations": turn("a"), "model": "x", "score": 1} for index in range(3)]
    load_records(rows)
    assert caplog.text.count("left out the keys 'model', 'score', which llava has no use for") == 1
    caplog.clear()
    load_records([{"id": 1, "conversations": turn("a")}])
    assert not caplog.text


def test_counts_and_places_survive_what_is_done_to_a_stream(folder):
    """The report belongs to the reading, whatever `datasets` wraps around it; a mixture goes on where it stopped."""
    path = write_jsonl(folder / "d.jsonl", [row(id=str(index)) for index in range(20)] + [row(image="gone.png")])
    report = LoadReport()
    data = load_records(path, streaming=True, on_bad="skip", report=report)
    changed = data.shuffle(seed=0, buffer_size=4).map(lambda record: {**record, "id": "x"})
    assert len(list(changed)) == 20
    assert (report.accepted, report.rejected) == (20, 1)
    mixture = mix({"a": data, "b": data}, [2, 1])
    ids = [one["id"] for one in mixture]
    iterator = iter(mixture)
    for _ in range(7):
        next(iterator)
    state = mixture.state_dict()
    fresh = mix({"a": data, "b": data}, [2, 1])
    fresh.load_state_dict(state)
    assert [one["id"] for one in fresh] == ids[7:]


def test_pillow_images_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    chat = messages([("<image>a", "b")])
    for image in (Image.open(tmp_path / "turned.jpg"), "turned.jpg"):
        stored = load_records([{"messages": chat, "images": [image]}], image_root=tmp_path)[0]["images"][0]
        assert decode_image(stored, "it").size == (20, 40)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes()[:-20])
    with pytest.raises(ValueError, match="its JPEG image: damaged or cut off"):
        load_records([{"messages": chat, "images": [Image.open(tmp_path / "cut.jpg")]}])


# ---- Paths ----


def outside(folder):
    os.symlink(folder.parent / "secret.png", folder / "link.png")
    os.symlink(folder.parent, folder / "up")
    (folder.parent / "images2").mkdir()
    (folder.parent / "images2" / "a.png").write_bytes(png())
    return {
        "../secret.png": "leads out of",
        "a/../../secret.png": "leads out of",
        str(folder.parent / "secret.png"): "leads out of",
        "link.png": "leads out of",
        "up/secret.png": "leads out of",
        "../images2/a.png": "leads out of",
        "/etc/passwd": "leads out of",
        "../../../../../../../../etc/passwd": "leads out of",
        "http://example.org/a.png": "is a URL",
        "HTTPS://example.org/a.png": "is a URL",
        " ftp://example.org/a.png": "is a URL",
        "file:///etc/passwd": "is a URL",
        "data:image/png;base64,AAAA": "is a URL",
        "s3://bucket/a.png": "is a URL",
        "": "names no file",
        ".": "not a file|leads out",
        "a\0.png": "no usable path",
        "a" * 5000: "no usable path",
        "\ud800.png": "no usable path|not in",
    }


def test_paths_stay_inside_the_folder(folder):
    for path, reason in outside(folder).items():
        data = write_json(folder / "d.json", [row(image=path)])
        with pytest.raises(ValueError, match=reason) as caught:
            load_records(data)
        assert str(caught.value).startswith("d.json: record 'r-9' (entry 0): image ")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500
        in_part = {"role": "user", "content": [{"type": "image", "url": path}]}
        for other in (
            {"messages": messages([("<image>a", "b")]), "images": [{"path": path, "bytes": None}]},
            {"messages": [in_part, *messages([("a", "b")])]},
            {"file_name": path, "text": "a"},
        ):
            with pytest.raises(ValueError, match=reason):
                load_records([other], image_root=folder)


def test_paths_that_are_allowed(folder):
    os.symlink(folder / "red.png", folder / "inside.png")
    (folder / "sub").mkdir()
    os.symlink(folder, folder.parent / "alias")
    good = ["red.png", "./red.png", "sub/../red.png", str(folder / "red.png"), "inside.png"]
    data = write_json(folder / "sub" / "d.json", [row(image=path) for path in good])
    for root in (folder, folder.parent / "alias", os.path.relpath(folder)):
        found = load_records(data, image_root=root)
        assert [one["images"][0]["path"] for one in found] == [os.path.realpath(folder / "red.png")] * len(good)
    with pytest.raises(FileNotFoundError, match=r"image 'red.png' is not in .*set image_root"):
        load_records(data)


def test_a_data_set_in_memory_has_no_folder():
    with pytest.raises(ValueError, match=r"record 'r-9' \(entry 0\): .* has no folder to look in. Set image_root"):
        load_records([row()])


# ---- Errors ----

BAD_ROWS = {
    "too many images": (row(image=["red.png", "red.png"]), "2 images, but 1 placeholder"),
    "too few images": (row(conversations=turn("<image><image>")), "1 image, but 2 placeholders"),
    "no image": ({"id": "r-9", "conversations": turn()}, "0 images, but 1 placeholder"),
    "missing file": (row(image="gone.png"), "image 'gone.png' is not in"),
    "empty answer": (row(conversations=turn(answer=" \n")), "assistant turn is empty"),
    "one empty answer": (row(conversations=turn() + turn("a", "")), "assistant turn 2 of 2 is empty"),
    "answer left out": (row(conversations=[turn()[0], {"from": "gpt"}]), "assistant turn is empty"),
    "no question": (row(conversations=[{"from": "human"}, turn()[1]]), "key 'content': the user turn has none"),
    "no answer": (row(conversations=turn()[:1]), "no assistant turn"),
    "no turn": (row(conversations=[]), "no assistant turn"),
    "a text": (row(conversations="hello"), "key 'conversations': 'hello' is not a list"),
    "a text turn": (row(conversations=["hello"]), "key 'conversations': turn 'hello' is not an object"),
    "a number": (row(conversations=turn(answer=5)), "key 'value': 5 is not a text"),
    "image number": (row(image=5), "image 5 is neither a path, nor bytes, nor an image"),
    "image without": (row(image={"a": 1}), "has neither 'bytes' nor 'path'"),
    "no bytes": (row(image={"bytes": b""}), "an image of 0 bytes"),
    "role": (row(conversations=[{"from": "tool", "value": "a"}, *turn()]), "key 'from': 'tool' is not one of system"),
    "other keys": ({"id": "r-9", "txt": "a"}, "key 'conversations' is missing; it has 'id', 'txt'"),
    "both": (row(images=["red.png"]), "'image' and 'images' are both there"),
    "id": (row(id=[1]), r"key 'id': \[1\] is neither"),
    "surrogate": (row(conversations=turn(answer="\ud800")), "half a surrogate pair at character 0"),
    "system": (row(system=3), "key 'system': 3 is not a text"),
}
BAD_MESSAGES = {
    "role": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "key 'role': 'tool' is not one of system, user, assistant",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "key 'role': None is not one of"),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "key 'content': 5 is neither"),
    "part": ({"messages": [{"role": "user", "content": ["a"]}]}, "part 'a' is not an object"),
    "video": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a part of type 'video'"),
    "part text": ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "key 'text': 5"),
    "url": ({"messages": [{"role": "user", "content": [{"type": "image", "url": "http://a/b"}]}]}, "is a URL"),
    "not a message": ({"messages": ["a"]}, "message 'a' is not an object"),
    "image without a user": (
        {"messages": [{"role": "assistant", "content": "a"}], "images": [b"a"]},
        "1 image, but 0 placeholders",
    ),
    "answer in prompt": (
        {"prompt": messages([("a", "b"), ("c", "d")])[:3], "completion": "d"},
        "key 'prompt': it has an assistant turn",
    ),
    "prompt": ({"prompt": 3, "completion": "a"}, "key 'prompt': 3 is not a list"),
    "empty completion": ({"prompt": "a", "completion": ""}, "assistant turn is empty"),
    "caption": ({"image": b"a", "text": 4}, "key 'text': 4 is not a text"),
    "empty caption": ({"image": b"a", "text": ""}, "assistant turn is empty"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_errors_name_file_record_and_key(folder, name):
    bad, message = BAD_ROWS[name]
    rows = [row(id="good"), bad, row(id="also good")]
    if name == "no bytes":
        options = {"data": rows, "image_root": folder}
    else:
        options = {"data": write_jsonl(folder / "d.jsonl", rows)}
    with pytest.raises(ValueError, match=message) as caught:
        load_records(**options)
    place = (
        r"dataset: record 'r-9' \(entry 1\)"
        if name == "no bytes"
        else r"d\.jsonl: record '(r-9|d\.jsonl:1)' \(line 2\)"
    )
    assert re.match(f"{place}: ", str(caught.value))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError) == (name == "missing file")
    report = LoadReport()
    assert load_records(**options, on_bad="skip", report=report)["id"] == ["good", "also good"]
    assert (report.accepted, report.rejected, report.total) == (2, 1, 3)
    assert re.match(place, report.reasons[0][0])
    assert re.search(message, report.reasons[0][1])


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_errors_of_the_other_formats(name):
    bad, message = BAD_MESSAGES[name]
    with pytest.raises(ValueError, match=rf"record 'r-9' \(entry 0\): .*{message}"):
        load_records([{"id": "r-9", **bad}])


def test_skipping_logs_each_record_once(folder, caplog):
    path = write_jsonl(folder / "d.jsonl", [row(), row(id="x", image="gone.png"), row(id="y", image="../secret.png")])
    data = load_records(path, on_bad="skip")
    for name in ("'x'", "'y'"):
        assert sum(name in line for line in caplog.text.splitlines()) == 1
    assert "2 of 3 records left out" in caplog.text
    assert len(data) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", "", "holds no records"),
        ("d.json", "[]", "holds no records"),
        ("d.jsonl", "\n\n", "holds no records"),
        ("d.json", '{"a": 1,\n "b": 2}', "its first line alone is not one"),
        ("d.json", "hello", "neither a list of records"),
        ("d.json", '[{"c": []}, {"a" 1}]', "not valid JSON in entry 1 .*begins '{.a. 1}.'"),
        ("d.json", '[{"c": []}, {"d', "not valid JSON in entry 1 .*Unterminated string"),
        ("d.json", "[1, 2] 3", "not valid JSON in entry 2 .*something follows the list"),
        ("d.json", "[" * 100_000, "not valid JSON in entry 0"),
        ("d.json", b"[\xff]", "not valid JSON in entry 0 .*not UTF-8"),
        ("d.json", "[1, 2]", "no readable record among the first 2. The first: 1 is not an object"),
        ("d.jsonl", "a\nb\n", "no readable record among the first 2. The first: not valid JSON"),
        ("d.jsonl", '{"b": 1}\n{"a": 2}', "keys found: 'a', 'b'. Known formats are sharegpt: .*llava: "),
        ("d.csv", "a,b\n1,2\n", "keys found: 'a', 'b'. Known formats"),
        ("d.parquet", "PAR", "not a Parquet file"),
        ("d.xml", "<a/>", r"no reader for '\.xml'. Known: \.json, \.jsonl"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_files_that_are_no_data(tmp_path, name, content, message, on_bad):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_records(path, on_bad=on_bad)
    assert str(path) in str(caught.value) or name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_and_folders_that_are_no_data(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_records(tmp_path / "gone.json")
    with pytest.raises(ValueError, match=r"found blue\.png, green\.png.*known are metadata\.jsonl"):
        load_records(folder)
    for name in ("a.json", "b.json"):
        write_json(folder / name, [row()])
    with pytest.raises(ValueError, match=r"several data files \(a\.json, b\.json\)"):
        load_records(folder)
    with pytest.raises(ValueError, match=r"format='coco' is not known. Known formats are sharegpt"):
        load_records(folder / "a.json", format="coco")
    with pytest.raises(ValueError, match="on_bad='drop': expected one of error, skip"):
        load_records(folder / "a.json", on_bad="drop")
    with pytest.raises(FileNotFoundError, match="image_root='nowhere': no such folder"):
        load_records(folder / "a.json", image_root="nowhere")
    with pytest.raises(ValueError, match="data is a int"):
        load_records(3)
    split = datasets.DatasetDict({"train": load_records(folder / "a.json")})
    with pytest.raises(ValueError, match=r"DatasetDict with train: pass one"):
        load_records(split)
    split.save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"a DatasetDict with train\. Name the folder"):
        load_records(tmp_path / "splits")
    bad = write_jsonl(folder / "bad.jsonl", [row(image="gone.png")] * 2)
    with pytest.raises(ValueError, match=r"not one of 2 records can be used. The first: bad\.jsonl: record 'r-9'"):
        load_records(bad, on_bad="skip")


def test_our_own_records_saved_and_loaded(folder, collator):
    data = load_records(llava_json(folder, RICH))
    data.save_to_disk(folder / "saved")
    with pytest.raises(ValueError, match="leads out of"):
        load_records(folder / "saved")
    assert list(load_records(folder / "saved", image_root=folder)) == list(data)


def test_streaming_meets_bad_records_on_the_way(folder):
    path = write_jsonl(folder / "d.jsonl", [row(), row(id="x", image="gone.png"), row()])
    data = iter(load_records(path, streaming=True))
    next(data)
    with pytest.raises(FileNotFoundError, match=r"record 'x' \(line 2\)"):
        next(data)
    report = LoadReport()
    data = load_records(path, streaming=True, on_bad="skip", report=report)
    assert report.total == 0
    for _ in range(2):  # each pass counts anew
        assert len(list(data)) == 2
        assert (report.accepted, report.rejected) == (2, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image", "holds text"), (png((32, 32))[:50], "damaged|cannot be"), (png((10_000, 6_000)), "too large")],
)
def test_images_that_cannot_be_decoded_name_the_record(folder, collator, content, message):
    (folder / "bad.png").write_bytes(content)
    by_path = load_records([row(image="bad.png")], image_root=folder)
    by_bytes = load_records([row(image={"bytes": content, "path": "bad.png"})])
    for data in (by_path, by_bytes):
        with pytest.raises(ValueError, match=rf"record 'r-9': .*({message})") as caught:
            collator([data[0]])
        assert "\n" not in str(caught.value)
    (folder / "bad.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"record 'r-9': .*bad\.png: no such file"):
        collator([by_path[0]])


# ---- Thousands of bad records ----


def broken(choose, good):
    """``good`` with something wrong in it, or nearly so: any value anywhere may be anything."""
    odd = [None, "", " ", 0, -1, 1.5, True, [], {}, [[]], [None], {"a": {}}, float("nan"), ["red.png"], "HUGE"]
    odd += ["\ud800", "\0", "<image>", "a" * 10_000, "\n\r\u2028", "tool"]
    odd += ["../secret.png", "http://a/b.png", "red.png/", "gone.png"]
    value = json.loads(json.dumps(good))
    for _ in range(choose.choice([1, 1, 1, 2, 4])):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = choose.choice(keys)
            if isinstance(at[key], (dict, list)) and choose.random() < 0.7:
                at = at[key]
                continue
            if choose.random() < 0.3:
                del at[key]
            elif isinstance(at, dict) and choose.random() < 0.15:
                at[choose.choice(["", "images", "image", "role", "type", "id"])] = at.pop(key)
            else:
                at[key] = json.loads(json.dumps(choose.choice(odd)))
            break
    return value


def spoiled(choose, line):
    """A line of a file as a broken disk or a careless script leaves it."""
    line = bytearray(line)
    kind = choose.randrange(4)
    if kind == 0:
        del line[choose.randrange(1, len(line)) :]
    elif kind == 1:
        line[choose.randrange(len(line))] = choose.choice([0, 0xFF, 0x80, ord('"'), ord("{")])
    elif kind == 2:
        line = bytearray(choose.choice([b"null", b"[]", b"3", b"[" * 5000, b"{" * 5000, b"NaN", b"\xff\xfe", b'"a"']))
    return bytes(line)


FUZZED = {
    "llava": {"id": "a", "image": "red.png", "conversations": turn()},
    "sharegpt": {"id": "a", "images": ["red.png", "blue.png"], "system": "s", "conversations": turn("<image><image>c")},
    "messages": {"id": "a", "images": ["red.png"], "messages": messages([("<image>a", "b"), ("c", "d")])},
    "prompt_completion": {"id": "a", "image": "red.png", "prompt": "a", "completion": "b"},
    "captions": {"id": "a", "file_name": "red.png", "text": "a", "prompt": "b"},
}


@pytest.mark.parametrize("format", FUZZED)
def test_thousands_of_malformed_records(folder, collator, format, caplog):
    assert set(FUZZED) == set(FORMATS)
    caplog.set_level("CRITICAL")
    choose = random.Random(format)
    lines = [json.dumps(FUZZED[format]).encode()]
    for _ in range(2000):
        line = json.dumps(broken(choose, FUZZED[format])).encode() if choose.random() < 0.8 else lines[0]
        line = line.replace(b'"HUGE"', b"9" * 5000)  # more digits than Python reads
        lines.append(spoiled(choose, line) if choose.random() < 0.3 else line)
    lines = [line for line in lines if line.strip() and b"\n" not in line]
    path = folder / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = LoadReport()
    data = load_records(path, on_bad="skip", report=report)
    assert report.format == format
    assert report.accepted + report.rejected == report.total == len(lines)
    assert len(data) == report.accepted > 200
    assert report.rejected > 200
    for called, reason in report.reasons:
        assert "\n" not in called + reason
        assert len(called + reason) < 700
    # What was let through can be used: its text may still hold the model's own image token.
    for record in data.select(range(0, len(data), 10)):
        try:
            collator([record])
        except ValueError as error:
            assert "must not contain '<image>' itself" in str(error)  # noqa: PT017


def test_malformed_lists_and_tables(folder):
    choose = random.Random(0)
    rows = [row(id=index) if choose.random() < 0.5 else broken(choose, row(id=index)) for index in range(500)]
    report = LoadReport()
    load_records(write_json(folder / "d.json", rows), format="llava", on_bad="skip", report=report)
    assert report.total == 500
    good = "red.png,a square\n"
    odd = [
        "red.png\n",
        "red.png,a,b\n",
        "gone.png,a\n",
        "red.png,\n",
        ",\n",
        '"red.png"x,a\n',
        "\0,a\n",
    ]
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(good + one + good for one in odd) + good * 3)
    load_records(folder / "metadata.csv", on_bad="skip", report=report)
    assert (report.accepted, report.rejected) == (2 * len(odd) + 3, len(odd))
    (folder / "metadata.csv").write_text(f'file_name,text\n{good}red.png,"a\n{good}')
    with pytest.raises(
        ValueError, match=r"record 'metadata.csv:1' \(line 4\): not valid CSV \(unexpected end of data\)"
    ):
        load_records(folder / "metadata.csv")
    (folder / "metadata.csv").write_bytes(b"file_name,text\nred.png,a\nred.png,\xff\n")
    load_records(folder / "metadata.csv", on_bad="skip", report=report)
    assert (report.accepted, report.rejected) == (1, 1)
    assert "not valid UTF-8" in report.reasons[0][1]


def test_jsonl_lists_are_as_good_as_lists(folder):
    """Both readers of JSON hand on the same rows."""
    by_list, by_line = load_records(llava_json(folder, RICH)), load_records(llava_jsonl(folder, RICH))
    assert list(by_list) == list(by_line)
