"""Recipes that extend others, and presets: what wins, and what is refused."""

import pytest
import yaml

from seecal.core.options import PRESETS, CALOptions
from seecal.recipes.layers import load
from seecal.recipes.recipe import arguments, read

BASE = {"model": "m", "data": "d.json", "output_dir": "out"}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """{name: settings} → files of that name in the folder in which the command runs."""
    monkeypatch.chdir(tmp_path)

    def write(**recipes):
        for name, settings in recipes.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))

    return write


def test_keys_go_on_keys_and_stages_on_stages(files):
    below = {**BASE, "alpha": 0.5, "beta": 4, "stages": [{"learning_rate": 1e-3, "window": 1}, {"learning_rate": 2e-5}]}
    files(below=below, own={"extends": "below.yaml", "model": "n", "beta": 6, "stages": [{"window": 5}, {}]})
    recipe = read("own.yaml")
    assert recipe.model == "n"
    assert recipe.output_dir.name == "out"
    settings = [stage.settings for stage in recipe.stages]
    assert [(one["alpha"], one["beta"], one["learning_rate"]) for one in settings] == [(0.5, 6, 1e-3), (0.5, 6, 2e-5)]
    assert [one.get("window") for one in settings] == [5, None]
    assert "extends" not in recipe.resolved
    assert load("below.yaml") == below, "nothing of it has changed"


def test_a_recipe_of_ours_is_extended_by_its_name_and_over_several_files(files):
    files(one={"extends": "mgm-13b", "output_dir": "mine"}, two={"extends": "one.yaml", "beta": 3})
    recipe, shipped = read("two.yaml"), read("mgm-13b")
    assert str(recipe.output_dir) == "mine"
    for stage, its in zip(recipe.stages, shipped.stages, strict=True):
        assert stage.settings == {**its.settings, "beta": 3}
        assert (stage.data, stage.train) == (its.data, its.train)


def test_the_resolved_recipe_of_one_that_extends_needs_no_other(files, tmp_path):
    files(own={"extends": "llava-next-13b", "preset": "released"})
    recipe = read("own.yaml")
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert read("resolved.yaml") == recipe


STAGES = [{"learning_rate": 1e-3}, {"learning_rate": 2e-5}]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"extends": "none.yaml"}, "own.yaml: extends: none.yaml: no such file. Give a recipe's path"),
        ({"extends": "own.yaml"}, "extends goes round in a circle"),
        ({"extends": 3}, "extends: expected a recipe's name or path, got 3"),
        (
            {"extends": "below.yaml", "stages": [{}]},
            "stages: below.yaml, which it extends, has 2. Give an entry for each",
        ),
        ({"extends": "below.yaml", "stages": "x"}, "stages: below.yaml, which it extends, has 2"),
        ({"extends": "below.yaml", "stages": ["x", {}]}, "stages: expected a list of mappings"),
        (
            {"extends": "below.yaml", "learning_rate": 1e-4},
            "learning_rate at the top level would change nothing: stage 1 of below.yaml, which it extends, sets its own",
        ),
        ({"extends": "below.yaml", "bta": 3}, "bta: no such key. Did you mean beta?"),
    ],
)
def test_what_cannot_be_put_together(files, own, message):
    files(below={**BASE, "stages": STAGES}, own=own)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read("own.yaml")
    assert message in " ".join(str(error.value).split())


def test_a_circle_of_two_files_names_both(files):
    files(one={"extends": "two.yaml"}, two={"extends": "one.yaml"})
    with pytest.raises(ValueError, match=r"in a circle: .*one.yaml -> .*two.yaml -> .*one.yaml"):
        read("one.yaml")


def test_extends_is_no_setting_of_the_command_line():
    with pytest.raises(ValueError, match="--extends: it stands in a recipe file"):
        read("tiny", arguments(["--extends", "llava-1.5-7b"]))


# ---- presets ----

RELEASED = {"normalize": "micro_batch", "pool_scope": "released", "contrast": "mask"}


def cal_of(recipe):
    return [{name: stage.settings.get(name) for name in RELEASED} for stage in recipe.stages]


def test_the_released_code_is_one_name():
    """What it departs from the equations in: the second pass masks, pools over the batch, divides by the micro-batch."""
    assert PRESETS["released"] == RELEASED
    assert CALOptions(**PRESETS["released"]).window == CALOptions().window


@pytest.mark.parametrize("name", ["llava-1.5-7b", "mgm-2b", "qwen3-vl-lora"])
def test_a_preset_from_the_command_line(name):
    plain, changed = read(name), read(name, arguments(["--preset", "released"]))
    assert cal_of(plain) == [dict.fromkeys(RELEASED)] * len(plain.stages)
    assert cal_of(changed) == [RELEASED] * len(plain.stages)
    assert "preset" not in changed.to_yaml(), "what it stands for is written out"


def test_a_preset_of_one_stage():
    recipe = read("llava-1.5-7b", arguments(["--stages.2.preset", "released"]))
    assert cal_of(recipe) == [dict.fromkeys(RELEASED), RELEASED]


def test_what_is_set_beside_a_preset_wins_and_what_is_below_it_does_not(files):
    below = {**BASE, "normalize": "sample"}
    files(below=below, beside={**below, "preset": "released"}, above={"extends": "below.yaml", "preset": "released"})
    assert cal_of(read("beside.yaml")) == [{**RELEASED, "normalize": "sample"}]
    assert cal_of(read("above.yaml")) == [RELEASED]
    assert cal_of(read("below.yaml", arguments(["--preset", "released"]))) == [RELEASED]
    both = arguments(["--normalize", "global", "--preset", "released"])
    assert cal_of(read("below.yaml", both)) == [{**RELEASED, "normalize": "global"}]
    files(stages={**BASE, "normalize": "global", "stages": [{"preset": "released"}, {"learning_rate": 1e-3}]})
    assert [one["normalize"] for one in cal_of(read("stages.yaml"))] == ["micro_batch", "global"]


@pytest.mark.parametrize(
    ("settings", "argv", "message"),
    [
        ({"preset": "relesed"}, [], "preset: relesed: no such preset. Did you mean released?"),
        ({"preset": 3}, [], "preset: 3: no such preset. There are released"),
        ({"stages": [{"preset": "x"}]}, [], "stages.1.preset: x: no such preset"),
        ({}, ["--preset", "x"], "--preset: x: no such preset"),
        ({}, ["--preset"], "no such preset"),
    ],
)
def test_presets_that_are_none(files, settings, argv, message):
    files(own={**BASE, **settings})
    with pytest.raises(ValueError) as error:
        read("own.yaml", arguments(argv))
    assert message in str(error.value)
