"""A folder that Dataset.save_to_disk wrote, from somebody else: its own files alone are read."""

import json
import shutil

import datasets
import pytest

from seecal import load_records
from tests.support.sources import turn


@pytest.fixture
def saved(tmp_path):
    rows = [{"id": str(number), "conversations": turn("What?")} for number in range(3)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "in" / "set")
    shutil.copytree(tmp_path / "in" / "set", tmp_path / "outside")
    return tmp_path / "in" / "set"


def test_it_is_read(saved):
    assert len(load_records(saved)) == 3


@pytest.mark.parametrize(
    "form", ["{outside}/{name}", "../../outside/{name}", "sub/../../../outside/{name}", "link.arrow", None]
)
def test_files_of_another_folder_are_not(saved, form):
    state = json.loads((saved / "state.json").read_text())
    outside = saved.parents[1] / "outside"
    name = state["_data_files"][0]["filename"]
    (saved / "sub").mkdir()
    (saved / "link.arrow").symlink_to(outside / name)
    state["_data_files"] = [{"filename": form and form.format(outside=outside, name=name)}]
    (saved / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state.json: it names .*, which is no file of this folder"):
        load_records(saved)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{}", '{"_data_files": [1]}', "\0"])
def test_a_state_that_is_none(saved, text):
    (saved / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state.json: cannot be read"):
        load_records(saved)
