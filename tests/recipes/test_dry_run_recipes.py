"""The shipped recipes pass a dry run without a model, data or network: one of each model class always, all when asked."""

import pytest

from seecal.recipes.dry_run import dry_run
from seecal.recipes.layers import SHIPPED

# A recipe for each class; fewer tiles than the recipe has, where they are many
CLASSES = {
    "llava-1.5-7b": [],
    "llava-next-7b": [],
    "mgm-2b": [],
    "qwen3-vl-lora": [],
    "internvl-lora": ["--processor_kwargs.max_patches", "1"],
    "smolvlm-full": [],
    "paligemma-lora": [],
    "gemma3-qlora": [],
}


def check(found):
    assert found.problems == []
    assert found.to_provide, "nothing of it is there"
    for stage in found.stages:
        assert set(stage.moved) == set(stage.trains)
        assert stage.label_tokens > 0
        assert len(stage.losses) == 2
    assert found.stages[-1].delta is not None
    assert isinstance(found.answer, str)


@pytest.mark.parametrize("name", CLASSES)
def test_a_recipe_of_each_class(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(dry_run(name, overrides=CLASSES[name]))
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dry_run(name)
    check(found)
    assert found.seconds < 180
