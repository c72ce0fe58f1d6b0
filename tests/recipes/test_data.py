"""The data of a recipe as its stages get it: several sources counted, by weight or each record once, by the run's seed."""

import json
from collections import Counter

import pytest

from seecal.recipes import run as train
from seecal.recipes.stage_runner import StageRunner
from tests.support.recipe_files import recipe_file
from tests.support.sources import messages

SIZES = {"a": 40, "b": 200}


@pytest.fixture
def sources(tmp_path):
    paths = {}
    for name, size in SIZES.items():
        paths[name] = tmp_path / f"{name}.jsonl"
        rows = [{"id": f"{name}{index}", "messages": messages([("a", "b")])} for index in range(size)]
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


@pytest.fixture
def data_of(tmp_path, monkeypatch):
    """(the recipe's data, its other settings) → [(training data, evaluation data) of each stage]."""
    given = []

    def note(self, data, eval_data):
        given.append((data, eval_data))
        return 0

    monkeypatch.setattr(StageRunner, "run", note)

    def run(data, **settings):
        given.clear()
        file = recipe_file(tmp_path / "r.yaml", tmp_path, tmp_path / "run", data=data, **settings)
        assert train.run(["--config", file]) == 0
        return [*given]

    return run


def drawn(data, sources):
    """How many rows come from each source, and the ids in their order."""
    names = {str(path): name for name, path in sources.items()}
    return Counter(names[source] for source in data["source"]), list(data["id"])


def weighted(sources, a, b):
    return [{"path": str(sources["a"]), "weight": a}, {"path": str(sources["b"]), "weight": b}]


def test_a_mixture_has_the_weights_of_the_recipe(sources, data_of):
    """Until every record was drawn: of 240 draws and more, the share of a set differs from its weight by 4 σ at most."""
    for a, b in ((3, 1), (1, 3), (1, 1)):
        ((data, _),) = data_of(weighted(sources, a, b))
        counts, ids = drawn(data, sources)
        share = a / (a + b)
        assert abs(counts["a"] / len(ids) - share) < 4 * (share * (1 - share) / len(ids)) ** 0.5
        assert {"a0", "a39", "b0", "b199"} <= set(ids)
        assert len(set(ids)) == 240, "every record at least once"


def test_without_weights_every_record_is_used_once(sources, data_of):
    ((data, _),) = data_of([str(path) for path in sources.values()])
    counts, ids = drawn(data, sources)
    assert counts == SIZES
    assert len(ids) == len(set(ids))
    assert ids[:40] != [f"a{index}" for index in range(40)], "mixed, not one after the other"


def test_the_runs_seed_draws_the_mixture(sources, data_of):
    for data in (weighted(sources, 1, 2), [str(path) for path in sources.values()]):
        orders = [drawn(data_of(data, **settings)[0][0], sources)[1] for settings in ({}, {"seed": 42}, {"seed": 7})]
        assert orders[0] == orders[1], "42 is transformers' own seed"
        assert orders[0] != orders[2]


def test_one_file_named_twice_is_two_sources(sources, data_of):
    """With two image folders, say."""
    path = str(sources["a"])
    ((data, _),) = data_of([path, path])
    assert Counter(data["source"]) == {path: 40, f"{path} (1)": 40}


def test_each_stage_has_its_own_data_and_evaluation(sources, data_of):
    a, b = (str(path) for path in sources.values())
    stages = [{}, {"data": b, "eval_data": a}]
    first, second = data_of(a, stages=stages)
    assert (len(first[0]), first[1]) == (40, None)
    assert (len(second[0]), len(second[1])) == (200, 40)


@pytest.mark.parametrize("limits", [(10, 2), (0.5, 0.01), (None, 0)])
def test_each_stage_has_its_own_limit_of_bad_records(limits, sources, data_of):
    """Of data that both stages share: 8 records of 208 are bad."""
    with sources["b"].open("a") as file:
        file.writelines(['{"id": "bad", "messages": []}\n'] * 8)
    wide, narrow = ({"max_bad_records": limit} for limit in limits)
    given = {"data": str(sources["b"]), "on_bad": "skip"}
    assert [len(data) for data, _ in data_of(**given, stages=[wide, wide])] == [200, 200]
    for stages in ([wide, narrow], [narrow, wide]):
        with pytest.raises(ValueError, match=f"more than max_bad_records={narrow['max_bad_records']} allows"):
            data_of(**given, stages=stages)
