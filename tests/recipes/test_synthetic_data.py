"""Made-up records load like real ones, whatever the kind of file, the format and the names of keys."""

import pytest

from seecal.data.sources.formats import FORMATS
from seecal.data.sources.load import load_records
from seecal.data.sources.readers import READERS
from seecal.recipes.recipe import Source
from seecal.recipes.synthetic_data import write_synthetic

OPTIONS = {
    "plain": {},
    "columns": {"columns": {"picture": "image", "note": None}},
    "listed": {"columns": {"pictures": "images"}},
    "split": {"split": "train"},
    "root": {"image_root": "anywhere"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("path", [*(f"data{suffix}" for suffix in READERS), "a-folder", "LLaVA-1.5"])
def test_every_kind_of_file_in_every_format(path, options, tmp_path):
    for number, name in enumerate([None, *FORMATS]):
        source = write_synthetic(Source(path, format=name, **OPTIONS[options]), tmp_path / str(number), 16)
        records = load_records(source.path, **source.options())
        captions = name == "captions" or (name is None and path.endswith(("csv", "tsv")))
        assert len(records) == 16
        assert sum(bool(record["images"]) for record in records) == (16 if captions else 14)


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
