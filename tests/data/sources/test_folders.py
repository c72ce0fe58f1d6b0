"""Folders with several splits are not trained on as a whole."""

import datasets
import pytest

from seecal import load_records
from seecal.data.sources.folders import split_of
from tests.support.sources import images_in, messages, png, row, write_jsonl


def rows(word):
    return [{"id": word, "messages": messages([("a", word)])}]


def parquet(path, word):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows(word)).to_parquet(path)


def hub(folder):
    """As a data set lies on the Hub."""
    for part in range(2):
        parquet(folder / "data" / f"train-0000{part}-of-00002.parquet", f"train{part}")
    parquet(folder / "data" / "validation-00000-of-00001.parquet", "validation0")
    parquet(folder / "data" / "test-00000-of-00001.parquet", "test0")
    (folder / "README.md").write_text("a data set")
    (folder / "dataset_infos.json").write_text("{}")


def beside(folder):
    """Files called after their splits, without a folder of their own."""
    folder.mkdir()
    for name, word in (("my_train_v2", "train0"), ("my_val", "validation0"), ("my-test", "test0")):
        write_jsonl(folder / f"{name}.jsonl", rows(word))
    write_jsonl(folder / "my_train_v3.jsonl", rows("train1"))


def folders(folder):
    for name, word in (("train", "train0"), ("valid", "validation0"), ("test", "test0")):
        (folder / name).mkdir(parents=True)
        write_jsonl(folder / name / "part1.jsonl", rows(word))
    write_jsonl(folder / "train" / "part2.jsonl", rows("train1"))


def saved(folder):
    words = {"train": ["train0", "train1"], "validation": ["validation0"], "test": ["test0"]}
    sets = {
        name: datasets.Dataset.from_list([*rows(of[0]), *(rows(of[1]) if of[1:] else [])]) for name, of in words.items()
    }
    datasets.DatasetDict(sets).save_to_disk(folder)


LAYOUTS = {layout.__name__: layout for layout in (hub, beside, folders, saved)}


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_split_has_to_be_chosen(tmp_path, name, streaming):
    LAYOUTS[name](tmp_path / "set")
    with pytest.raises(ValueError, match=r"train.*split=") as caught:
        load_records(tmp_path / "set", streaming=streaming)
    for split in ("train", "validation", "test"):
        assert split in str(caught.value)
        ids = [record["id"] for record in load_records(tmp_path / "set", split=split, streaming=streaming)]
        assert sorted(ids) == [f"{split}{part}" for part in range(2 if split == "train" else 1)]
    with pytest.raises(ValueError, match=r"no split 'extra'. There are .*train"):
        load_records(tmp_path / "set", split="extra")
    if name != "saved":
        assert load_records(tmp_path / "set", split="val")["id"] == ["validation0"]


def test_one_split_alone_needs_no_choice(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", "train0")
    assert load_records(tmp_path)["id"] == load_records(tmp_path, split="train")["id"] == ["train0"]
    file = tmp_path / "data" / "train-00000-of-00001.parquet"
    assert load_records(file, split="train")["id"] == ["train0"]
    with pytest.raises(ValueError, match=r"this is one file, so split='test' chooses nothing"):
        load_records(file, split="test")


def test_images_of_each_split_lie_beside_its_table(tmp_path):
    for split in ("train", "test"):
        images_in(tmp_path / split)
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\nred.png,{split}\n")
    with pytest.raises(ValueError, match=r"several splits, test .1 file., train .1 file."):
        load_records(tmp_path)
    data = load_records(tmp_path, split="train")
    assert data[0]["images"][0]["path"] == str(tmp_path / "train" / "red.png")


def test_sets_in_memory(tmp_path):
    sets = datasets.DatasetDict({name: datasets.Dataset.from_list(rows(name)) for name in ("train", "test")})
    assert load_records(sets, split="test")["id"] == ["test"]
    with pytest.raises(ValueError, match=r"a DatasetDict with train, test: pass one"):
        load_records(sets)
    with pytest.raises(ValueError, match=r"split='train': this data set is one split already"):
        load_records(sets["train"], split="train")


def test_a_split_beside_files_of_none(tmp_path):
    parquet(tmp_path / "test.parquet", "test0")
    parquet(tmp_path / "part-0.parquet", "other")
    with pytest.raises(ValueError, match=r"no split in the name \(1 file\), test \(1 file\)"):
        load_records(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.json", "train"), ("Train-00000-of-00002.parquet", "train"), ("llava_train.json", "train"),
        ("val-00000-of-00001-0a1b2c.parquet", "validation"), ("dev.jsonl", "validation"), ("eval.jsonl", "test"),
        ("minival-00000-of-00001.parquet", "minival"), ("part-0.parquet", None), ("latest.json", None),
        ("llava_v1_5_mix665k.json", None), ("trainer.json", None), ("contest.json", None),
    ],
)  # fmt: skip
def test_what_a_name_says(name, split):
    assert split_of(name) == split


def test_other_folders_are_read_as_before(tmp_path):
    for part in range(2):
        parquet(tmp_path / f"part-{part}.parquet", f"p{part}")
    assert load_records(tmp_path)["id"] == ["p0", "p1"]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes(png())
    write_jsonl(tmp_path / "one" / "d.jsonl", [row(image="a.png")])
    assert load_records(tmp_path / "one")["id"] == ["r-9"]
