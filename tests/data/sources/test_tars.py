"""WebDataset shards: records out of tar files, one after another."""

import io
import json
import tarfile

import datasets
import pytest

from seecal import LoadReport, VisionCollator, load_records
from tests.support.sources import conversations, png, turn
from tests.support.tiny import tiny_llava_processor


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def captions(folder):
    """As img2dataset writes them: the caption twice, an address, sizes."""
    about = {"caption": "It is red.", "url": "http://host/a.jpg", "width": 4, "status": "success", "exif": None}
    for shard in range(2):
        files = {}
        for index in range(3):
            key = f"{shard:05d}{index:04d}"
            files |= {f"{key}.jpg": png(), f"{key}.txt": b"It is red.", f"{key}.json": {**about, "key": key}}
        write_tar(folder / f"{shard:05d}.tar", files)
    return folder


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
def test_captions(tmp_path, streaming, caplog):
    report = LoadReport()
    data = load_records(captions(tmp_path), streaming=streaming, report=report)
    records = list(data)
    assert [record["id"] for record in records] == [
        f"{shard:05d}{index:04d}" for shard in range(2) for index in range(3)
    ]
    assert records[0]["images"] == [{"path": None, "bytes": png()}]
    assert records[0]["messages"][1]["content"][0]["text"] == "It is red."
    assert report.format == "captions"
    each = 3 if streaming else 6  # a stream tells it shard by shard
    counts = f"(in {each}, {each}, {each}, {each} of {each} records)"
    assert f"'key', 'status', 'url', 'width', which captions has no use for {counts}" in caplog.text
    if streaming:
        assert isinstance(data, datasets.IterableDataset)
        assert data.num_shards == 2
        state = iter(data)
        next(state)
        saved = data.state_dict()
        again = load_records(tmp_path, streaming=True)
        again.load_state_dict(saved)
        assert [record["id"] for record in again] == [record["id"] for record in records[1:]]
    batch = VisionCollator(tiny_llava_processor())(records)
    assert int((batch["labels"] != -100).sum()) > 0


def test_chats_of_several_shapes(tmp_path):
    """The builder alone takes the first five records for all: rows of another shape would be refused or changed."""
    files = {}
    for index in range(7):
        about = {"conversations": turn(), "n": index}
        files |= {f"a{index}.png": png(), f"a{index}.json": about}
    text_only = {"conversations": conversations([("What?", "It is.")]), "n": "a text", "extra": [1]}
    several = {"id": "own", "conversations": turn("<image><image>What?"), "image": ["x.png", "y.png"], "n": 1.5}
    files |= {"b.json": text_only, "c.10.png": png((8, 8)), "c.2.png": png((4, 4)), "c.json": several}
    files |= {"d.png": png(), "d.json": turn()}
    records = list(load_records(write_tar(tmp_path / "train-000.tar", files)))
    assert [record["id"] for record in records] == [*(f"a{index}" for index in range(7)), "b", "own", "d"]
    assert [len(record["images"]) for record in records] == [1] * 7 + [0, 2, 1]
    assert [image["bytes"] for image in records[8]["images"]] == [png((4, 4)), png((8, 8))]


def test_bad_samples_are_records_and_bad_files_are_not(tmp_path):
    good = {"a.png": png(), "a.json": {"conversations": turn()}}
    films = {"b.mp4": b"film", "b.json": {"conversations": turn("What?")}}
    twice = {"c.png": png(), "c.txt": b"a", "c.caption": b"b"}
    report = LoadReport()
    path = write_tar(tmp_path / "a.tar", {**good, **films, **twice})
    assert load_records(path, on_bad="skip", report=report)["id"] == ["a"]
    assert ["its file .mp4 is no image" in report.reasons[0][1], "2 texts beside" in report.reasons[1][1]] == [
        True,
        True,
    ]
    with pytest.raises(ValueError, match=r"record 'a.tar:1' \(sample 1\): its file .mp4"):
        load_records(path)
    (tmp_path / "no.tar").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"no\.tar: cannot be read as a WebDataset shard"):
        load_records(tmp_path / "no.tar")
    whole = write_tar(tmp_path / "cut.tar", {f"{index}.png": png((64, 64)) for index in range(9)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        load_records(tmp_path / "cut.tar")


def test_shards_of_several_splits(tmp_path):
    for name in ("set-train-0000", "set-test-0000"):
        write_tar(tmp_path / f"{name}.tar", {"a.png": png(), "a.txt": name.encode()})
    with pytest.raises(ValueError, match=r"several splits"):
        load_records(tmp_path)
    assert load_records(tmp_path, split="train")[0]["messages"][1]["content"][0]["text"] == "set-train-0000"
