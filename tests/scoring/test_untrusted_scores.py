"""A folder of scores from somebody else: one line for whatever its manifest and shards say."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from seecal.pages.report import report
from seecal.scoring.manifest import NAME
from seecal.scoring.selection import filter as filter_scores
from seecal.scoring.shards import path_of
from tests.support.scored import llava_file, scored_folder


@pytest.fixture
def scored(tmp_path):
    """(folder of scores, its data)."""
    data = llava_file(tmp_path / "data", ["It is red.", "It is blue."])
    scored_folder(data, tmp_path / "scores")
    return tmp_path / "scores", data


def changed(folder, part=None, **keys):
    told = json.loads((folder / NAME).read_text())
    (told if part is None else told[part]).update(keys)
    (folder / NAME).write_text(json.dumps(told))


def refused(folder, tmp_path, why):
    for use in (
        lambda: report(folder, out=tmp_path / "page.html"),
        lambda: filter_scores(folder, out=tmp_path / "kept.json", top=0.5),
    ):
        with pytest.raises(ValueError, match=why) as told:
            use()
        assert "\n" not in str(told.value)


WRONG = [
    ("data", {"rows": 10**15}, "shards are missing|another version"),
    ("data", {"rows": -1}, "it has -1 rows"),
    ("data", {"rows": "2"}, "it has '2' rows"),
    ("data", {"rows": True}, "it has True rows"),
    ("data", {"name": ["/etc"]}, "its data.name is no text"),
    ("data", {"fingerprint": None}, "its data.fingerprint is no text"),
    ("model", {"name": 7}, "its model.name is no text"),
    (None, {"records_per_shard": 0}, "in shards of 0"),
    (None, {"records_per_shard": 1.5}, "in shards of 1.5"),
    (None, {"columns": "delta"}, "its columns are no list"),
    (None, {"options": []}, "options or versions are no mapping"),
    (None, {"model": "a"}, "cannot be read"),
]


@pytest.mark.parametrize(("part", "keys", "why"), WRONG, ids=range(len(WRONG)))
def test_a_manifest_of_other_types(scored, tmp_path, part, keys, why):
    changed(scored[0], part, **keys)
    refused(scored[0], tmp_path, why)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "{"])
def test_a_manifest_that_is_none(scored, tmp_path, text):
    (scored[0] / NAME).write_text(text)
    refused(scored[0], tmp_path, r"_manifest.json: cannot be read")


@pytest.mark.parametrize(
    "note", [b"{}", b"[]", b"[" * 100_000, b'{"skipped": [{"a": 1}], "manifest": 1, "shard": 0}', None]
)
def test_a_shard_that_says_something_else(scored, tmp_path, note):
    path = path_of(scored[0], 0)
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata(note and {b"seecal.scores": note}), path)
    refused(scored[0], tmp_path, "not a whole shard of scores")


@pytest.mark.parametrize("row", [-1, 2, 2**60])
def test_rows_that_the_data_does_not_have(scored, tmp_path, row):
    path = path_of(scored[0], 0)
    table = pyarrow.parquet.read_table(path)
    rows = pyarrow.array([row] * table.num_rows, pyarrow.int64())
    table = table.set_column(table.schema.get_field_index("row"), "row", rows)
    pyarrow.parquet.write_table(table.replace_schema_metadata(table.schema.metadata), path)
    refused(scored[0], tmp_path, rf"scores of row {row} of 2")


def test_data_that_its_scores_were_not_made_of_is_not_shown(scored, tmp_path):
    """A manifest that names another file: its contents have another fingerprint."""
    secret = llava_file(tmp_path / "secret", ["The password is 1234.", "It is blue."])
    changed(scored[0], "data", name=str(secret), image_root=[str(secret.parent)])
    refused(scored[0], tmp_path, "scores of another version")
    assert not (tmp_path / "page.html").exists()
