"""quarantine.jsonl of a recipe's run: what loading refused and what training met, of all stages."""

import json
import shutil

import pytest

from seecal.data.sources.quarantine_file import read_quarantine
from seecal.recipes import run as train
from tests.support.recipe_files import recipe_file

STAGES = [{"max_steps": 2}, {"max_steps": 3}]


@pytest.fixture
def spoiled(tiny, tmp_path):
    """The tiny data with a record without messages, and one whose image is damaged behind its header."""
    folder = tmp_path / "data"
    shutil.copytree(tiny, folder)
    rows = json.loads((folder / "data.json").read_text())
    rows[1] = {"id": rows[1]["id"], "conversations": "none"}
    seen = next(row for row in rows[2:12] if row.get("image"))
    path = folder / seen["image"]
    (folder / "damaged.png").write_bytes(path.read_bytes()[:-40])
    seen["image"] = "damaged.png"
    (folder / "data.json").write_text(json.dumps(rows))
    return folder, str(rows[1]["id"]), str(seen["id"])


def settings(**changes):
    return {"on_bad": "skip", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 12, **changes}


def test_one_file_for_loading_and_all_stages(spoiled, tiny, tmp_path):
    folder, malformed, damaged = spoiled
    out = tmp_path / "out"
    config = recipe_file(tmp_path / "r.yaml", folder, out, **settings(stages=STAGES))
    assert train.run(["--config", config]) == 0
    found = [(one["id"], one["where"], one["stage"], one["step"]) for one in read_quarantine(out / "quarantine.jsonl")]
    assert found == [(malformed, "loading", None, None), (damaged, "training", 1, 1), (damaged, "training", 2, 1)]
    row = read_quarantine(out / "quarantine.jsonl")[0]
    assert (row["source"], row["row"], row["rank"]) == ("data.json", 1, 0)
    listed = tmp_path / "known.jsonl"
    shutil.copy(out / "quarantine.jsonl", listed)
    again = recipe_file(
        tmp_path / "a.yaml",
        folder,
        tmp_path / "again",
        **settings(stages=STAGES, on_bad="error", skip_records=str(listed)),
    )
    assert train.run(["--config", again]) == 0, "what the list names is never met"
    met = read_quarantine(tmp_path / "again" / "quarantine.jsonl")
    assert {one["where"] for one in met} == {"loading"}
    assert len(met) == 2


def test_a_stream_writes_what_its_workers_refuse(spoiled, tmp_path):
    folder, malformed, damaged = spoiled
    out = tmp_path / "out"
    more = settings(streaming=True, max_steps=4, dataloader_num_workers=2, per_device_train_batch_size=4)
    config = recipe_file(tmp_path / "r.yaml", folder, out, **more)
    assert train.run(["--config", config]) == 0
    found = read_quarantine(out / "quarantine.jsonl")
    assert [(one["id"], one["step"]) for one in found if one["where"] == "loading"] == [(malformed, None)]
    assert {one["id"] for one in found if one["where"] == "training"} == {damaged}


@pytest.mark.parametrize("most", [1, 0.005])
def test_too_many_at_loading_end_the_run_with_the_list(spoiled, tmp_path, most):
    folder, malformed, _ = spoiled
    rows = json.loads((folder / "data.json").read_text())
    rows = (rows * 5)[:120]
    rows[2] = rows[3] = {"id": "worse", "conversations": []}
    (folder / "data.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    config = recipe_file(tmp_path / "r.yaml", folder, out, **settings(max_steps=1, max_bad_records=most))
    with pytest.raises(
        ValueError, match=rf"max_bad_records={most:g} allows. The first: .*All of them: {out}/quarantine.jsonl"
    ):
        train.run(["--config", config])
    assert read_quarantine(out / "quarantine.jsonl")[0]["id"] == malformed
    assert train.run(["--config", config, "--max_bad_records", "50"]) == 0, "in the same folder"


def test_a_list_that_is_none(spoiled, tmp_path):
    folder, _, _ = spoiled
    out = tmp_path / "out"
    for path, says in (
        (out / "quarantine.jsonl", "is the list that this run writes"),
        (tmp_path / "no", "no such file"),
    ):
        config = recipe_file(tmp_path / "r.yaml", folder, out, **settings(max_steps=1, skip_records=str(path)))
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            train.run(["--config", config])
