"""What the demo writes: records that load, batches of one kind, an order that the seed gives, a recipe that is read."""

import json
import random

import pytest

from seecal import load_records
from seecal.demo import emoji, files
from seecal.demo.plan import of_steps
from seecal.demo.state import DemoOptions, Score, open_state
from seecal.recipes.recipe import read

BATCH = 4


@pytest.fixture(scope="module")
def items():
    return emoji.catalogue()


@pytest.fixture
def images(items, tmp_path):
    """A path for every drawing, and a few that are really there."""
    rendered = emoji.render_openmoji(items[:40], tmp_path / "images")
    return {item.hexcode: tmp_path / "images" / f"{emoji.slug(item.name)}.png" for item in items} | rendered


def test_the_first_steps_are_the_same_however_many_follow(items):
    short, long = (files.questions(items, steps, BATCH, seed=1) for steps in (5, 300))
    assert long[: len(short)] == short
    assert len(long) == 300 * BATCH
    assert files.questions(items, 5, BATCH, seed=2) != short
    assert {item.split for item, _ in long} == {emoji.TRAIN}
    train = len(emoji.by_split(items, emoji.TRAIN))
    assert len({item.hexcode for item, _ in long}) == min(train, 300 * BATCH), "each drawing before any comes again"


def test_a_batch_asks_one_kind_of_question_and_all_kinds_come(items):
    found = files.questions(items, 60, BATCH, seed=0)
    batches = [{answer.question for _, answer in found[i : i + BATCH]} for i in range(0, len(found), BATCH)]
    assert all(len(batch) == 1 for batch in batches)
    assert set().union(*batches) == set(emoji.QUESTIONS.values())


def test_data_json_is_what_load_records_reads(items, images, tmp_path):
    asked = [(item, emoji.answer(item, "name", random.Random(0))) for item in items[:6]]
    files.write_data(tmp_path / "data.json", asked, images)
    rows = json.loads((tmp_path / "data.json").read_text("utf8"))
    assert rows[0]["image"].startswith("images/")
    found = load_records(str(tmp_path / "data.json"))
    assert len(found) == 6
    for row, (item, answer) in zip(found, asked, strict=True):
        user, assistant = (message["content"] for message in row["messages"])
        assert [part["type"] for part in user] == ["image", "text"]
        assert user[1]["text"] == answer.question
        assert assistant[0]["text"] == item.name


def test_eval_json_comes_back_as_it_was_asked(items, images, tmp_path):
    shown = {split: files.held_out(items, split, 3) for split in (emoji.HELD_IMAGE, emoji.HELD_CONCEPT)}
    files.write_eval(tmp_path / "eval.json", shown, images)
    found = files.read_eval(tmp_path / "eval.json")
    assert set(found) == {(split, question) for split in shown for question in ("name", "kind")}
    for (split, question), pairs in found.items():
        assert [path for path, _ in pairs] == [images[item.hexcode] for item in shown[split]]
        assert [answer.text for _, answer in pairs] == [getattr(item, question) for item in shown[split]]
        assert all(answer.question == emoji.QUESTIONS[question] for _, answer in pairs)
        assert all(seen for _, answer in pairs for _, seen in answer.pieces)


def test_the_recipe_is_one(tmp_path):
    out = tmp_path / "it's: a #folder"
    out.mkdir()
    plan = of_steps(45)
    text = files.recipe(out, plan, batch_size=16, weighting="cal", seed=3, on_cpu=True, bf16=False)
    (out / "recipe.yaml").write_text(text, "utf8")
    found = read(str(out / "recipe.yaml"))
    assert found.output_dir == out / "run"
    assert found.model == str(out / "start")
    align, tune = found.stages
    assert (align.train, align.freeze, align.settings["max_steps"]) == (("projector",), (), 4)
    assert (tune.train, tune.freeze) == (("projector", "language_model"), ("embeddings",))
    assert tune.settings["max_steps"] == 41
    assert [stage.settings["weighting"] for stage in found.stages] == ["uniform", "cal"]
    assert all(stage.cache_vision_features for stage in found.stages)
    for stage in found.stages:
        config = stage.config(tmp_path / "stage")
        assert config.warmup_steps == (0.05 if stage is tune else 0), "4 steps are too few for one at a rate of 0"
        assert config.train_sampling_strategy == "sequential"
        assert (config.seed, config.data_seed, config.max_length, config.bf16) == (3, 3, None, False)


def test_the_state_comes_back_and_other_options_are_refused(tmp_path):
    options = DemoOptions(tmp_path / "demo", steps=4)
    state = open_state(options)
    state.scores["as shipped"] = {("held_image", "name"): Score(1.5, 0.25, 8, 12)}
    state.bf16, state.machine, state.seconds = True, "a machine", 12.5
    state.save()
    assert open_state(options) == state
    with pytest.raises(
        ValueError, match=r"other options \(steps\)\. Go on with the same ones \(seecal demo .*--steps 4\)"
    ):
        open_state(DemoOptions(tmp_path / "demo", steps=5))
    (tmp_path / "demo" / "demo.json").write_text("{")
    with pytest.raises(ValueError, match=r"demo\.json: damaged"):
        open_state(options)


def test_the_command_that_goes_on_is_the_shortest_one():
    assert DemoOptions().command() == "seecal demo"
    found = DemoOptions(out="a b", steps=7, weighting="uniform").command()
    assert found == "seecal demo --out 'a b' --steps 7 --weighting uniform"
