"""A recipe's run goes on with the data and the steps that it was begun with."""

import json
import shutil

import pytest
import yaml

from seecal.data.sources.quarantine_file import read_quarantine
from seecal.recipes import run as train
from seecal.recipes.folder import RunFolder
from seecal.recipes.recipe import read
from seecal.recipes.stage_runner import StageRunner
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


# ---- stages that have not begun ----

STAGES = [{"train": "projector", "learning_rate": 1e-3}, {"max_steps": 4}, {}]


@pytest.fixture
def begun(tiny, tmp_path):
    """(changes of its stages) → the folder of a run whose first stage is finished, with a recipe so changed."""

    def folder(second=None, first=None, **changes):
        stages = [{**STAGES[0], **(first or {})}, {**STAGES[1], **(second or {})}, STAGES[2]]
        file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", stages=stages, max_steps=2, **changes)
        return RunFolder(read(file))

    folder().write_recipe()
    (tmp_path / "run" / "stage-1" / "model").mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"learning_rates": {"projector": 1e-6}}, "learning_rates was None, is {'projector': 1e-06}"),
        ({"train": "lora", "lora": {}}, "lora was None, is {}; stages.2.train was ['projector', 'language_model'], is"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size was 4, is 1"),
    ],
)
def test_a_stage_that_has_not_begun_may_be_mended(begun, second, says):
    (line,) = begun(second).check(resume=True)
    assert line.startswith(f"stage 2 has not begun, so it goes by its new settings: stages.2.{says}")
    assert begun().check(resume=True) == []


def test_a_stage_that_has_begun_may_not(begun, tmp_path):
    both = {"second": {"beta": 4}, "first": {"learning_rate": 1}}
    with pytest.raises(ValueError, match=r"another recipe: stages\.1\.learning_rate was 0\.001, is 1\.0\. Go on"):
        begun(**both).check(resume=True)
    with pytest.raises(ValueError, match=r"another recipe: model_init_kwargs was None, is {'dtype': 'bfloat16'}"):
        begun({"beta": 4}, model_init_kwargs={"dtype": "bfloat16"}).check(resume=True)
    (tmp_path / "run" / "stage-2" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another recipe: stages\.2\.beta was None, is 4\.0"):
        begun({"beta": 4}).check(resume=True)


def test_a_step_may_be_cut_in_another_way_while_a_later_stage_is_mended(begun, tmp_path):
    """Each stage's steps are compared with its own."""
    checkpoint = tmp_path / "run" / "stage-1" / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text('{"ranks": 1}')
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    (line,) = begun({"per_device_train_batch_size": 8}, first=cut).check(resume=True)
    assert "stages.2.per_device_train_batch_size was 4, is 8" in line
    assert "stages.1" not in line


def test_a_mended_run_goes_on(tiny, tmp_path, monkeypatch, capsys):
    """What stops the second stage is found in its data while it trains; mended, the first stage's result is used."""
    stages = [{"train": "projector"}, {"learning_rate": 1e-4}]
    config = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", stages=stages, max_steps=1, save_strategy="no")
    own = StageRunner.train

    def stop(self, *given):
        if self.stage.number == 2:
            raise ValueError("a bad record")
        own(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(StageRunner, "train", stop)
        with pytest.raises(ValueError, match="a bad record"):
            train.run(["--config", config])
    first = (tmp_path / "run" / "stage-1" / "model" / "model.safetensors").stat().st_mtime_ns
    assert train.run(["--config", config, "--resume", "--stages.2.learning_rate", "2e-4"]) == 0
    assert (
        "stage 2 has not begun, so it goes by its new settings: stages.2.learning_rate was" in capsys.readouterr().out
    )
    assert (tmp_path / "run" / "stage-1" / "model" / "model.safetensors").stat().st_mtime_ns == first
    kept = yaml.safe_load((tmp_path / "run" / "final" / "recipe.yaml").read_text())
    assert kept["stages"][1]["learning_rate"] == 2e-4


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
