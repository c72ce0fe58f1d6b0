"""Recipes come from somebody else too: YAML that would run code, or stand for more than a machine holds, is refused."""

import os

import pytest

from seecal.recipes.recipe import load
from tests.support.planted import left_no

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]" for n in range(1, 10)]
)


def loaded(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf8")
    return load(str(path))


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch mark']",
        "!!python/object/new:os.system ['touch mark']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:os.system {}",
        "!!python/tuple [1]",
        "!own {a: 1}",
    ],
)
@pytest.mark.parametrize("where", ["model: {}", "model: a\nstages:\n  - train: {}", "? {}\n: 1"])
def test_objects_are_not_made(tmp_path, monkeypatch, tag, where):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"recipe.yaml: not valid YAML: .*could not determine a constructor"):
        loaded(tmp_path, where.format(tag))
    left_no(tmp_path / "mark")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAUGHS, "aliases that stand for over 100,000 values"),
        (LAUGHS.replace("[", "{k: [").replace("]", "]}"), "aliases that stand for over 100,000 values"),
        ("a: &a [*a]", "an alias inside of what it stands for"),
        ("a: &a {b: {c: *a}}", "an alias inside of what it stands for"),
        ("a: &a\n  <<: *a", "an alias inside of what it stands for"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "{b: " * 5000, "nested too deeply"),
        ("#" * (1 << 20) + "\na: 1", "over 1,048,576 characters: this is no recipe"),
    ],
    ids=range(8),
)
def test_more_than_a_recipe_needs(tmp_path, text, why):
    with pytest.raises(ValueError, match=rf"recipe.yaml: .*{why}"):
        loaded(tmp_path, text)


def test_a_file_without_end_is_not_held(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 1\n")
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match="over 1,048,576 characters"):
        load(str(path))


def test_aliases_of_a_recipe_are_as_before(tmp_path):
    found = loaded(tmp_path, "model: a\nstages:\n  - &c {learning_rate: 1.0e-5}\n  - *c\n")
    assert found["stages"] == [{"learning_rate": 1e-5}, {"learning_rate": 1e-5}]
