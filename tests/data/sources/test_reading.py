"""What a reader must not lose or mix up: fields of tables, empty keys, where images lie, whose image is whose."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from seecal import LoadReport, load_records

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
