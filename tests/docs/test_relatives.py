"""docs/relatives.md: its recipes run with the options that they name, and its table has every relative."""

import json
import re

import pytest
import yaml

import seecal
from seecal.recipes import run as train
from seecal.recipes.tiny import tiny_folder
from tests.support.paths import ROOT
from tests.support.recipe_files import QUICK

PAGE = (ROOT / "docs" / "relatives.md").read_text("utf8")
RECIPES = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    tiny_folder(folder / "out" / "tiny")
    return folder


def test_every_relative_has_a_row_and_a_recipe():
    relatives = list(seecal.WEIGHTINGS.keys() - {"cal", "uniform"})
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.M)
    assert sorted(rows) == sorted([*relatives, "weighting"])  # the head of the table
    assert sorted(recipe["weighting"] for recipe in RECIPES) == sorted(relatives)
    for recipe in RECIPES:
        row = re.search(rf"^\| `{recipe['weighting']}` \| (.*?) \|", PAGE, re.M)[1]
        for key in recipe.keys() - {"weighting", "prior_exponent"}:
            assert f"`{key}" in row, f"{recipe['weighting']}: {key} is not in the table"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["weighting"])
def test_a_recipe_trains_with_what_it_names(recipe, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    whole = {**QUICK, "model": "out/tiny/model", "data": "out/tiny/data.json", "max_steps": 1, "logging_steps": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**whole, **recipe, "output_dir": str(tmp_path / "run")}))
    assert train.run(["--config", str(tmp_path / "r.yaml")]) == 0
    written = yaml.safe_load((tmp_path / "run" / "final" / "recipe.yaml").read_text())
    assert recipe.items() <= written["stages"][0].items()
    (figures,) = json.loads((tmp_path / "run" / "final" / "metrics.json").read_text())["stages"]
    assert figures["train"]["loss"] > 0
