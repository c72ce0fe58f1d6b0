"""What a reader must not lose or mix up: fields of tables, empty keys, where images lie, whose image is whose."""

import io
import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from seecal import LoadReport, load_records
from seecal.scoring.write_back import write_back

CHAT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It."}]


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), colour).save(path)
    return path


def texts(record):
    return [(turn["role"], "".join(part["text"] or "" for part in turn["content"])) for turn in record["messages"]]


@pytest.mark.parametrize(("name", "sign"), [("a.tsv", "\t"), ("a.csv", ","), ("A.TSV", "\t")])
def test_tables_are_cut_at_their_own_sign(name, sign, tmp_path):
    picture(tmp_path / "a.png")
    other = "," if sign == "\t" else "\t"
    (tmp_path / name).write_text(f"file_name{sign}text\na.png{sign}one{other}two\n")
    (record,) = load_records(tmp_path / name)
    assert texts(record)[1] == ("assistant", f"one{other}two")


def test_image_root_is_where_images_lie(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "data").mkdir()
    rows = [{"image": "a.png", "conversations": [{**CHAT[0], "value": "<image> What?"}, CHAT[1]]}]
    (tmp_path / "data" / "a.json").write_text(json.dumps(rows))
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        load_records(tmp_path / "data" / "a.json")
    (record,) = load_records(tmp_path / "data" / "a.json", image_root=tmp_path / "elsewhere")
    assert record["images"][0]["path"] == str(tmp_path / "elsewhere" / "a.png")


def test_a_key_that_only_another_row_has_is_not_there(tmp_path):
    """Parquet gives every row the keys of all, and every message those of all messages."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "image": None},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "images": None},
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"image": None, "images": None, **row} for row in rows]), tmp_path / "a.parquet"
    )
    first, second = load_records(tmp_path / "a.parquet")
    assert texts(first) == [("user", "a"), ("assistant", "b")]
    assert texts(second) == [("user", "c"), ("assistant", "d")]
    assert first["images"] == second["images"] == []


def test_every_image_stands_in_its_own_place(tmp_path):
    """Parts that bring their image between parts that take the record's next one."""
    for name in ("one", "two", "own"):
        picture(tmp_path / f"{name}.png")
    content = [
        {"type": "image"},
        {"type": "image", "path": "own.png"},
        {"type": "text", "text": "Which?"},
        {"type": "image"},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "All."}]
    (record,) = load_records([{"messages": messages, "images": ["one.png", "two.png"]}], image_root=tmp_path)
    names = [image["path"].rpartition("/")[2] for image in record["images"]]
    assert names == ["one.png", "own.png", "two.png"]


def test_a_system_text_stands_before_the_rest():
    (record,) = load_records([{"system": "Be brief.", "conversations": CHAT}])
    assert texts(record) == [("system", "Be brief."), ("user", "What?"), ("assistant", "It.")]


def test_an_answer_inside_a_prompt_is_refused():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(ValueError, match="'prompt': it has an assistant turn, which would be trained on"):
        load_records([{"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}])


def test_a_second_pass_counts_anew(tmp_path):
    rows = [{"conversations": CHAT}, {"conversations": []}, {"conversations": CHAT}]
    report = LoadReport()
    data = load_records(rows, streaming=True, on_bad="skip", report=report)
    for _ in range(2):
        assert len(list(data)) == 2
        assert (report.accepted, report.rejected, report.total) == (2, 1, 3)
    with pytest.raises(ValueError, match="no assistant turn"):
        load_records(rows)


def made_of(batch):
    """A transform: the conversations of a set that only has images and words."""
    for images in batch["images"]:
        assert all(isinstance(image, Image.Image) for image in images)
    chats = [
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"It is {word}."}]
        for word in batch["word"]
    ]
    return {"id": [f"of {word}" for word in batch["word"]], "messages": chats, "images": batch["images"]}


@pytest.fixture
def words(tmp_path):
    """Three rows, the second with a damaged image, and images in each but the last."""
    held = picture(tmp_path / "a.png").read_bytes()
    images = [[{"bytes": held, "path": None}], [{"bytes": held[:20], "path": None}], []]
    features = datasets.Features({"word": datasets.Value("string"), "images": datasets.List(datasets.Image())})
    return datasets.Dataset.from_dict({"word": ["red", "bad", "none"], "images": images}, features=features)


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
def test_a_transform_makes_the_rows(words, streaming):
    data = words.with_transform(made_of)
    report = LoadReport()
    first, last = load_records(data, streaming=streaming, on_bad="skip", report=report)
    assert (first["id"], last["id"]) == ("of red", "of none")
    assert texts(first)[1] == ("assistant", "It is red.")
    assert [len(first["images"]), len(last["images"])] == [1, 0]
    with Image.open(io.BytesIO(first["images"][0]["bytes"])) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    assert "dataset:1" in report.reasons[0][0]
    with pytest.raises(
        ValueError, match=r"record 'dataset:1' \(row 1\): the set's transform cannot make it \(.* Correct"
    ):
        list(load_records(data, streaming=streaming))


def test_other_formats_of_a_set_are_none_of_ours(words):
    """What a set looks like in NumPy or of which columns is for its other users."""
    data = words.select([0]).add_column("caption", ["A red square."])
    wanted = load_records(data)[0]
    assert load_records(data.with_format("numpy", columns=["word"]))[0] == wanted
    data.set_transform(lambda batch: {"images": batch["images"], "caption": ["It is " + batch["word"][0]]})
    assert texts(load_records(data)[0])[1] == ("assistant", "It is red")
    data.reset_format()
    assert load_records(data)[0] == wanted


def test_a_set_with_a_transform_is_filtered_behind_it(words, tmp_path):
    write_back(words.with_transform(made_of), tmp_path / "kept", np.array([True, False, True]))
    kept = datasets.load_from_disk(tmp_path / "kept")
    assert kept["word"] == ["red", "none"]
    assert [record["id"] for record in load_records(kept.with_transform(made_of))] == ["of red", "of none"]
