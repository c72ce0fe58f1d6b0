"""Paths stay in their folder, and a record that cannot be used is one line or one count, whatever is wrong with it."""

import os
import re

import datasets
import pytest

from seecal.data.sources.load import LoadReport, load_records
from tests.support.sources import RICH, llava_json, messages, png, row, turn, write_json, write_jsonl

# ---- Paths ----


def outside(folder):
    os.symlink(folder.parent / "secret.png", folder / "link.png")
    os.symlink(folder.parent, folder / "up")
    (folder / "sub").mkdir()
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
        "data:image/svg+xml,<svg/>": "is a URL",
        "data:image/png;base64,AAAA": "not an image that Pillow can read",
        "s3://bucket/a.png": "is a URL",
        "": "names no file",
        ".": "leads out of",
        "sub": "is not a file",
        "a\0.png": "no usable path",
        "a" * 5000: "no usable path",
        "\ud800.png": "no usable path|not in",
    }


def test_paths_stay_inside_the_folder(folder):
    for path, reason in outside(folder).items():
        data = write_json(folder / "d.json", [row(image=path)])
        with pytest.raises(ValueError, match=reason) as caught:
            load_records(data)
        assert str(caught.value).startswith(
            ("d.json: record 'r-9' (entry 0): image ", "d.json: record 'r-9' (entry 0): an image ")
        )
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
        ("d.csv", "file_name,text,text\nr.png,A,B\n", "its header names 'text' twice"),
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


def test_images_that_cannot_be_decoded_name_the_record(folder, collator):
    content = png((32, 32))[:50]  # its header is whole
    (folder / "bad.png").write_bytes(content)
    by_path = load_records([row(image="bad.png")], image_root=folder)
    by_bytes = load_records([row(image={"bytes": content, "path": "bad.png"})])
    for data in (by_path, by_bytes):
        with pytest.raises(ValueError, match=r"record 'r-9': .*(damaged|cannot be)") as caught:
            collator([data[0]])
        assert "\n" not in str(caught.value)
    (folder / "bad.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"record 'r-9': .*bad\.png: no such file"):
        collator([by_path[0]])


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
@pytest.mark.parametrize(
    ("key", "number", "kind"),
    [
        ("weight_ids", 3_000_000_000, "int32"),
        ("weight_ids", 2**31, "int32"),
        ("weight_ids", -(2**40), "int32"),
        ("weights", 10**400, "float32"),
        ("weights", 1e39, "float32"),
    ],
    ids=["far over", "just over", "below", "no double", "no float"],
)
def test_numbers_that_a_column_cannot_hold_are_of_one_record(tmp_path, key, number, kind, streaming):
    good = {**row(image=None, conversations=turn("a")), "weights": [1.0, 2], "weight_ids": [0, 2**31 - 1]}
    rows = [{**good, "id": "good"}, {**good, key: [1, number]}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match=rf"record 'r-9' \(line 2\): key '{key}': .* is out of the range of {kind}"):
        list(load_records(path, streaming=streaming))
    (found,) = load_records(path, streaming=streaming, on_bad="skip")
    assert (found["id"], found["weights"], found["weight_ids"]) == ("good", [1, 2], [0, 2**31 - 1])


def test_whole_numbers_that_float32_rounds_are_weights():
    chat = {**row(image=None, conversations=turn("a")), "weights": [2**24 + 1, 2**70]}
    assert load_records([chat])[0]["weights"] == [2.0**24, 2.0**70]
