"""Made-up records load like real ones, whatever the kind of file, the format and the names of keys."""

import pytest

from seecal.data.sources.formats import FORMATS
from seecal.data.sources.load import load_records
from seecal.data.sources.readers import READERS
from seecal.recipes.recipe import Source
from seecal.recipes.synthetic_data import write_synthetic

PATHS = [*(f"data{suffix}" for suffix in READERS), "a-folder", "LLaVA-1.5"]
OPTIONS = {
    "columns": {"columns": {"picture": "image", "note": None}},
    "listed": {"columns": {"pictures": "images"}},
    "split": {"split": "train"},
    "root": {"image_root": "anywhere"},
}


def check(source, folder):
    """Eight records load, and all but one have an image, or all of them where there is no other kind."""
    made = write_synthetic(source, folder, 8)
    records = load_records(made.path, **made.options())
    captions = source.format == "captions" or (source.format is None and source.path.endswith(("csv", "tsv")))
    assert len(records) == 8
    assert sum(bool(record["images"]) for record in records) == (8 if captions else 7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [None, *FORMATS])
def test_every_kind_of_file_in_every_format(path, name, tmp_path):
    check(Source(path, format=name), tmp_path)


@pytest.mark.parametrize("path", ["data.json", "data.csv", "data.parquet", "data.tar", "a-folder"])
@pytest.mark.parametrize("options", OPTIONS)
def test_keys_splits_and_roots_are_called_as_the_recipe_has_them(path, options, tmp_path):
    check(Source(path, **OPTIONS[options]), tmp_path)


def test_records_are_of_many_kinds(tmp_path):
    made = write_synthetic(Source("data.json"), tmp_path / "several", 32)
    records = load_records(made.path)
    turns = {len(record["messages"]) for record in records}
    assert turns == {2, 4}
    assert len({record["images"][0]["path"].rpartition(".")[2] for record in records if record["images"]}) == 2
    made = write_synthetic(Source("data.json"), tmp_path / "one", 32, one_turn=True)
    assert {len(record["messages"]) for record in load_records(made.path)} == {2}


@pytest.mark.parametrize(
    ("source", "words"),
    [(Source("data.xlsx"), "no reader for '.xlsx'"), (Source("data.json", format="lava"), "'lava' is not known")],
)
def test_what_no_reader_knows_is_an_error(source, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        write_synthetic(source, tmp_path, 4)
