"""Counters that a task keeps in its module do not add up from run to run."""

import functools
import types

import pytest
from PIL import ImageFile

from seecal.evaluation.module_state import ModuleState, damaged_images_refused, functions_in

COUNTING = {
    "a dict, as OCRBench": ("score = {'a': 0}", "score['a'] += 1", lambda module: module.score["a"]),
    "a number": ("score = 0", "global score\n    score += 1", lambda module: module.score),
    "a list": ("score = []", "score.append(1)", lambda module: len(module.score)),
    "a Counter": (
        "from collections import Counter\nscore = Counter()",
        "score['a'] += 1",
        lambda module: module.score["a"],
    ),
    "a dict of lists": ("score = {'a': []}", "score['a'].append(1)", lambda module: len(module.score["a"])),
}


def module_of(first, count):
    module = types.ModuleType("task_utils")
    exec(f"{first}\ndef aggregate(results):\n    {count}\n", vars(module))
    return module


@pytest.mark.parametrize("kind", COUNTING)
def test_every_run_counts_from_the_start(kind):
    first, count, value = COUNTING[kind]
    module = module_of(first, count)
    before = value(module)
    for _ in range(2):
        kept = ModuleState([module.aggregate])
        module.aggregate([])
        module.aggregate([])
        assert value(module) == before + 2
        kept.restore()
        assert value(module) == before


def test_what_another_module_holds_too_stays_one_object():
    module = module_of(*COUNTING["a dict, as OCRBench"][:2])
    held = module.score
    kept = ModuleState([module.aggregate])
    module.aggregate([])
    kept.restore()
    assert module.score is held
    assert held == {"a": 0}


def test_functions_are_found_wherever_a_task_names_them():
    module = module_of("score = 0", "pass")
    bound = functools.partial(module.aggregate, results=[])
    config = {"doc_to_text": bound, "metric_list": [{"metric": "m", "aggregation": module.aggregate}], "task": "t"}
    assert list(functions_in(config)) == [bound, module.aggregate]
    module.score = 1
    kept = ModuleState([bound])
    module.score = 9
    kept.restore()
    assert module.score == 1


def test_what_cannot_be_copied_is_left_alone():
    module = module_of("score = 0", "pass")
    module.models = {"judge": (one for one in [])}  # generators cannot be copied
    held = module.models
    ModuleState([module.aggregate]).restore()
    assert module.models is held


@pytest.mark.parametrize("before", [False, True])
def test_pillows_rule_for_damaged_images_is_as_before(monkeypatch, before):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", before)
    with damaged_images_refused():
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = True  # an import
    assert before == ImageFile.LOAD_TRUNCATED_IMAGES


def test_pillows_rule_is_as_before_after_an_error(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)

    def fail():
        with damaged_images_refused():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert ImageFile.LOAD_TRUNCATED_IMAGES
