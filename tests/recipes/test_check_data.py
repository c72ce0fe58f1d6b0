"""seecal check-data: what it lists is what training would put aside, on any number of processes, whatever interrupts it."""

import json
import shutil

import pytest
from rich.console import Console

import seecal
from seecal.data.sources.quarantine_file import read_quarantine
from seecal.recipes import check_data as module
from seecal.recipes import run as train
from seecal.scoring.previewed import STOPS
from tests.support.recipe_files import recipe_file

QUIET = Console(quiet=True)


@pytest.fixture
def spoiled(tiny, tmp_path):
    """Two sources of one file name, each with bad records of its own kinds."""
    for name in ("one", "two"):
        shutil.copytree(tiny, tmp_path / name)
    rows = json.loads((tmp_path / "one" / "data.json").read_text())
    rows[1] = {"id": "malformed", "conversations": "none"}
    pictured = [row for row in rows if row.get("image")]
    (tmp_path / "one" / "half.png").write_bytes((tmp_path / "one" / pictured[3]["image"]).read_bytes()[:-40])
    pictured[3]["image"] = "half.png"
    pictured[4]["image"] = "none.png"
    (tmp_path / "one" / "data.json").write_text(json.dumps(rows))
    other = json.loads((tmp_path / "two" / "data.json").read_text())
    other[2]["conversations"] = other[2]["conversations"][:1]
    other[3]["conversations"][-1]["value"] += " red" * 200
    (tmp_path / "two" / "data.json").write_text(json.dumps(other))
    bad = {("one", "malformed"), ("one", pictured[3]["id"]), ("one", pictured[4]["id"]), ("two", other[2]["id"])}
    total = len(rows) + len(other) + len(json.loads((tiny / "eval.json").read_text()))
    return bad, total


def recipe(tmp_path, **changes):
    data = [str(tmp_path / name / "data.json") for name in ("one", "two")]
    eval_data = str(tmp_path / "one" / "eval.json")
    settings = {"data": data, "eval_data": eval_data, "max_length": 120, "on_bad": "skip", "max_steps": 2, **changes}
    return recipe_file(tmp_path / "r.yaml", tmp_path / "one", tmp_path / "out", **settings)


def listed(path):
    return {(one["source"].split("/")[-2], one["id"]) for one in read_quarantine(path)}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_record_is_looked_at_and_the_bad_are_listed(spoiled, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 16)
    bad, total = spoiled
    out = tmp_path / "bad.jsonl"
    found = seecal.check_data(recipe(tmp_path), out=out, workers=workers, console=QUIET)
    assert (found.looked_at, found.bad, found.before) == (total, 4, 0)
    assert listed(out) == bad
    assert {one["where"] for one in read_quarantine(out)} == {"check"}
    counts = {check.kind: check.count for check in found.checks}
    assert counts == {"format": 1, "image": 1, "missing": 1, "answer": 1, "long": 1}, "a long one is cut, and not bad"
    assert "4 cannot be used" in str(found)
    assert f"--skip_records {out}" in str(found)


def test_training_with_the_list_meets_none_of_them(spoiled, tmp_path):
    bad, _ = spoiled
    out = tmp_path / "bad.jsonl"
    strict = seecal.check_data(recipe(tmp_path, on_bad="error"), out=out, workers=1, console=QUIET)
    assert sum(check.count for check in strict.checks if check.fate == STOPS) == 4
    assert "training would stop at the first" in str(strict)
    assert train.run(["--config", recipe(tmp_path, on_bad="error", skip_records=str(out), num_train_epochs=1)]) == 0
    met = read_quarantine(tmp_path / "out" / "quarantine.jsonl")
    assert {(one["source"].split("/")[-2], one["row"]) for one in met} == {
        (one["source"].split("/")[-2], one["row"]) for one in read_quarantine(out)
    }, "the other source has rows of the same numbers, which are learnt"
    assert all(one["where"] == "loading" for one in met)
    assert len(met) == len(bad)


@pytest.mark.parametrize("at", [1, 3, 7])
def test_an_interrupted_check_goes_on(spoiled, tmp_path, monkeypatch, at):
    monkeypatch.setattr(module, "_CHUNK", 8)
    whole = tmp_path / "whole.jsonl"
    expected = seecal.check_data(recipe(tmp_path), out=whole, workers=1, console=QUIET)
    out, looked, note = tmp_path / "bad.jsonl", [], module._State._note

    def killed(self, complete):
        if len(looked) == at:
            raise KeyboardInterrupt  # the lines of the chunk are on the disk, and not noted as done
        looked.append(1)
        note(self, complete)

    monkeypatch.setattr(module._State, "_note", killed)
    with pytest.raises(KeyboardInterrupt):
        seecal.check_data(recipe(tmp_path), out=out, workers=1, console=QUIET)
    monkeypatch.setattr(module._State, "_note", note)
    again = seecal.check_data(recipe(tmp_path), out=out, workers=1, console=QUIET)
    assert again.before == 8 * at
    assert out.read_text() == whole.read_text()
    assert (again.looked_at, again.bad, again.checks) == (expected.looked_at, expected.bad, expected.checks)
    assert seecal.check_data(recipe(tmp_path), out=out, workers=1, console=QUIET).before == 0, "it was finished"
    (tmp_path / "two" / "eval.json").touch()
    assert out.read_text() == whole.read_text()


def test_an_interrupted_check_that_has_found_nothing_bad_goes_on(spoiled, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 1)  # the first record is good, the second is not
    note, looked = module._State._note, []

    def killed(self, complete):
        if looked:
            raise KeyboardInterrupt
        looked.append(1)
        note(self, complete)

    monkeypatch.setattr(module._State, "_note", killed)
    out = tmp_path / "bad.jsonl"
    with pytest.raises(KeyboardInterrupt):
        seecal.check_data(recipe(tmp_path), out=out, workers=1, console=QUIET)
    monkeypatch.setattr(module._State, "_note", note)
    monkeypatch.setattr(module, "_CHUNK", 16)
    again = seecal.check_data(recipe(tmp_path), out=out, workers=1, console=QUIET)
    assert (again.before, again.bad) == (1, 4)
    assert listed(out) == spoiled[0]


def test_other_data_begins_anew(spoiled, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 8)
    out, note = tmp_path / "bad.jsonl", module._State._note
    monkeypatch.setattr(module._State, "finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        seecal.check_data(recipe(tmp_path), out=out, workers=1, console=QUIET)
    monkeypatch.undo()
    assert note
    rows = json.loads((tmp_path / "one" / "data.json").read_text())
    (tmp_path / "one" / "data.json").write_text(json.dumps(rows[:-1]))
    found = seecal.check_data(recipe(tmp_path), out=out, workers=1, console=QUIET)
    assert found.before == 0
    assert len(read_quarantine(out)) == 4


def test_what_stands_in_the_way(spoiled, tmp_path):
    (tmp_path / "mine.txt").write_text("my own words")
    with pytest.raises(ValueError, match="something else is there"):
        seecal.check_data(recipe(tmp_path), out=tmp_path / "mine.txt", workers=1)
    assert (tmp_path / "mine.txt").read_text() == "my own words"
    with pytest.raises(ValueError, match="workers=0"):
        seecal.check_data(recipe(tmp_path), out=tmp_path / "x", workers=0)
    with pytest.raises(FileNotFoundError, match="no such file"):
        seecal.check_data(recipe(tmp_path, data=str(tmp_path / "no.json")), out=tmp_path / "x", workers=1)
