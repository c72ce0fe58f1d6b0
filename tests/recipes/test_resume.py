"""A recipe's run goes on with the data and the steps that it was begun with."""

import json
import shutil

import pytest

from seecal.data.sources.quarantine_file import read_quarantine
from seecal.recipes import run as train
from tests.support.recipe_files import recipe_file


@pytest.fixture
def stopped(tiny, tmp_path):
    """(its data, its folder, what makes its recipe with changes) of a run that was ended after step 3 of 6."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny, data)

    def recipe(**changes):
        settings = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, **changes}
        return recipe_file(tmp_path / "recipe.yaml", data, out, **settings)

    assert train.run(["--config", recipe()]) == 0
    logged = losses(out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "stage-1" / "checkpoint-6")
    return data, out, recipe, logged


def losses(out):
    state = json.loads((out / "stage-1" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_other_data_are_refused(stopped):
    data, out, recipe, logged = stopped
    config = recipe()
    before = (data / "data.json").read_text()
    rows = json.loads(before)
    rows[7]["conversations"][1]["value"] = "It is."
    (data / "data.json").write_text(json.dumps(rows))
    with pytest.raises(
        ValueError, match=rf"checkpoint-3: train_dataset .*record 7 \('{rows[7]['id']}'\) is another"
    ) as no:
        train.run(["--config", config, "--resume"])
    assert "\n" not in str(no.value)
    (data / "data.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(ValueError, match=r"begun with 64 records, and this is 63 records"):
        train.run(["--config", config, "--resume"])
    (data / "data.json").write_text(before)
    assert train.run(["--config", config, "--resume"]) == 0
    assert losses(out) == logged


def test_other_data_are_taken_where_that_is_asked_for(stopped):
    data, out, recipe, _ = stopped
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps(rows[:40]))
    assert train.run(["--config", recipe(ignore_data_skip=True), "--resume"]) == 0
    assert len(losses(out)) == 6


def test_a_step_that_is_cut_in_another_way(stopped, monkeypatch):
    _, out, recipe, logged = stopped
    with pytest.raises(ValueError, match=r"another recipe: per_device_train_batch_size was 4, is 2"):
        train.run(["--config", recipe(per_device_train_batch_size=2), "--resume"])
    monkeypatch.setenv("WORLD_SIZE", "2")  # the product with the ranks is what counts
    with pytest.raises(ValueError, match=r"another recipe: gradient_accumulation_steps was .*, is 2"):
        train.run(["--config", recipe(per_device_train_batch_size=2, gradient_accumulation_steps=2), "--resume"])
    monkeypatch.delenv("WORLD_SIZE")
    config = recipe(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert train.run(["--config", config, "--resume"]) == 0
    assert losses(out) == pytest.approx(logged, abs=1e-5)


def test_damage_to_the_last_ones_falls_back_with_the_reasons_and_the_same_list(tiny, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny, data)
    rows = json.loads((data / "data.json").read_text())
    for number in (3, 17, 21):
        path = data / rows[number]["image"]
        path.with_name(f"damaged-{number}.png").write_bytes(path.read_bytes()[:-40])
        rows[number]["image"] = str(path.with_name(f"damaged-{number}.png").relative_to(data))
    rows[5]["conversations"] = "none"
    (data / "data.json").write_text(json.dumps(rows))
    config = recipe_file(
        tmp_path / "recipe.yaml", data, out,
        on_bad="skip", max_steps=6, save_steps=2, logging_steps=1, train_sampling_strategy="sequential",
    )  # fmt: skip
    assert train.run(["--config", config]) == 0
    met, logged = read_quarantine(out / "quarantine.jsonl"), losses(out)
    assert {one["step"] for one in met} == {None, 1, 5, 6}, "before and after the checkpoint that it falls back to"
    shutil.rmtree(out / "final")
    optimizer = bytearray((out / "stage-1" / "checkpoint-6" / "optimizer.pt").read_bytes())
    optimizer[100] ^= 1
    (out / "stage-1" / "checkpoint-6" / "optimizer.pt").write_bytes(optimizer)
    (out / "stage-1" / "checkpoint-4" / "trainer_state.json").unlink()
    capsys.readouterr()
    assert train.run(["--config", config, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "checkpoint-6 is passed over: optimizer.pt has other bytes than were written" in said
    assert "checkpoint-4 is passed over: trainer_state.json is not there" in said
    assert "stage 1 of 1: continues at checkpoint-2" in said
    assert losses(out) == logged
    in_order = [sorted(map(json.dumps, one)) for one in (met, read_quarantine(out / "quarantine.jsonl"))]
    assert in_order[0] == in_order[1]
