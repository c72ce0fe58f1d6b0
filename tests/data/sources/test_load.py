"""Every format gives the same records, and a record that cannot be used is one line or one count."""

import json
import os
import pickle
import resource

import datasets
import pytest
import torch
from PIL import Image

from seecal.data.collators.vision import VisionCollator
from seecal.data.image_placement import split_text
from seecal.data.images.decode import decode_image
from seecal.data.sources.formats import FORMATS
from seecal.data.sources.load import LoadReport, LocatedRecords, load_records
from seecal.data.sources.mixture import mix
from seecal.data.sources.records import FEATURES
from tests.support.sources import (
    CONVERSATIONS,
    RICH,
    SIMPLE,
    WRITERS,
    expected,
    hub_like,
    hub_like_streaming,
    images_in,
    llava_rows,
    load,
    messages,
    parquet,
    row,
    saved,
    turn,
    write_json,
    write_jsonl,
)
from tests.support.tiny import tiny_llava_processor


@pytest.fixture(scope="module")
def collator():
    return VisionCollator(tiny_llava_processor())


@pytest.fixture
def folder(tmp_path):
    return images_in(tmp_path / "images")


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
    """Files whose pixels are gone load, since only their headers are read."""
    cut = (folder / "red.png").read_bytes()[:40]
    (folder / "bad.png").write_bytes(cut)
    data = load_records(write_json(folder / "d.json", [row(image="bad.png")]))
    assert data[0]["images"] == [{"path": str(folder / "bad.png"), "bytes": None}]
    (folder / "red.png").write_bytes(cut)
    for writer in (hub_like, hub_like_streaming, saved, parquet):
        assert next(iter(load_records(writer(folder, SIMPLE))))["images"] == [{"path": None, "bytes": cut}]


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


def test_columns_of_mixed_types(tmp_path):
    """`datasets` keeps them as JSON text: a text beside a list of parts must not come out in quotes."""
    rows = [{"messages": [{"role": "user", "content": "hi"}, *messages([("a", "b")])[1:]], "extra": [1, "b"]}] * 2
    data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    data.to_parquet(tmp_path / "d.parquet")
    for source in (rows, data, data.to_iterable_dataset(), tmp_path / "d.parquet"):
        question, answer = next(iter(load_records(source)))["messages"]
        assert (question["content"][0]["text"], answer["content"][0]["text"]) == ("hi", "b")


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


def test_no_room_in_the_temporary_folder():
    rows = [{"messages": messages([("a" * 10_000, "b")])}] * 20
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot be written to .*Set TMPDIR to a folder with room, or streaming"):
            load_records(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def quarantine(path, *entries):
    path.write_text("".join(json.dumps({"reason": "damaged", **entry}) + "\n" for entry in entries))
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
@pytest.mark.parametrize(
    ("ids", "key", "columns", "bad"),
    [
        (["r0", "r1", "r2"], "uid", {"uid": "id"}, "r1"),
        (["r0", "r1", "r2"], "uid", {"uid": None}, "k.json:1"),
        ([None, None, None], "id", None, "k.json:1"),
        ([0.0, 1.0, 2.0], "id", None, "1"),
        ([0, 1, 2], "uid", {"uid": "id"}, "1"),
        (["r0", "r1", "r2"], "id", None, "r1"),
    ],
)
def test_what_a_training_met_is_known_by_the_id_it_has_here(tmp_path, ids, key, columns, bad, streaming):
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    data = write_json(tmp_path / "k.json", [{key: one, "conversations": chat} for one in ids])
    before = load_records(data, columns=columns)["id"]
    assert before[1] == bad
    known = quarantine(tmp_path / "quarantine.jsonl", {"id": bad, "row": None, "source": None, "where": "training"})
    report = LoadReport()
    found = load_records(data, columns=columns, skip_records=known, report=report, streaming=streaming)
    assert [record["id"] for record in found] == [before[0], before[2]]
    assert report.known == report.rejected == 1


def test_what_is_known_of_one_saved_set_is_not_of_another(tmp_path):
    chat = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = datasets.Dataset.from_list([{"id": str(number), "conversations": chat} for number in range(3)])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    for place, options in ((tmp_path / "one", {}), (tmp_path / "two", {"split": "train"})):
        lines = [row.path for row in LocatedRecords(place, **options).rows()]
        known = quarantine(tmp_path / "bad.jsonl", {"id": "1", "row": 1, "source": lines[1], "where": "check"})
        assert load_records(place, skip_records=known, **options)["id"] == ["0", "2"]
        others = {(tmp_path / "one", None), (tmp_path / "two", "train"), (tmp_path / "two", "test")}
        for other, split in others - {(place, options.get("split"))}:
            assert len(load_records(other, split=split, skip_records=known)) == 3
        assert len(load_records(rows, skip_records=known)) == 3
