"""Every design is read strictly, and its runs are those that it lists."""

import copy

import pytest
import yaml
from experiments.designs import HERE, Arm, design, names

ALL = names()
PLAIN = {
    "question": "does it?", "hypothesis": "yes", "endpoints": {"primary": "exact", "secondary": "NLL"},
    "arms": {"uniform": {"options": {"weighting": "uniform"}}, "cal": {"options": {}}}, "compare": [["cal", "uniform"]],
    "runs": [{"cells": [{"model": "llava"}], "noise": [0, 0.5], "arms": ["uniform", "cal"], "seeds": [0, 1],
              "learning_rates": [1e-3]}],
    "minutes": {"alignment": 1, "run": 1}, "stopping": "when all are made", "cut": [],
}  # fmt: skip


def test_all_of_the_issues_experiments_are_there():
    assert ALL == [
        "beyond",
        "clamp",
        "contrasts",
        "controls",
        "delta_over_training",
        "more_cells",
        "noise",
        "real_weights",
        "relatives",
        "scenes",
        "scenes_rates",
        "stages",
        "stored_weights",
        "types_and_tasks",
        "window",
    ]


@pytest.mark.parametrize("name", ALL)
def test_a_design_says_what_it_must(name):
    found = design(name)
    assert len(found.runs) == sum(
        len(block["cells"])
        * len(block["noise"])
        * len(block["arms"])
        * len(block["seeds"])
        * len(block["learning_rates"])
        for block in found.told["runs"]
    )
    assert {run.name for run in found.runs} == set(found.arms), "an arm that no run has"
    assert {arm for pair in found.compare for arm in pair} == set(found.arms), "an arm that nothing is compared with"
    for arm in found.arms:
        seeds = {run.seed for run in found.runs if run.name == arm}
        assert len(seeds) >= (3 if name == "delta_over_training" else 5)
    for text in ("question", "hypothesis", "stopping"):
        assert len(found.told[text]) > 20
    assert found.cut, "what was left out is named"


def test_the_types_are_at_both_shares_of_swapped_answers_with_five_seeds():
    found = design("types_and_tasks")
    for cell in found.cells:
        for arm in ("uniform", "calibrated"):
            runs = {(run.noise, run.seed) for run in found.runs if run.name == arm and run.cell == cell}
            assert runs == {(noise, seed) for noise in (0, 0.2) for seed in range(5)}
    assert {cell["model"] for cell in found.cells} == {"llava", "llava_next", "qwen2_vl", "paligemma"}
    assert {cell["task"] for cell in found.cells} == {"shapes", "reading", "charts", "scenes"}
    assert {run.seed for run in design("noise").runs} == set(range(8))


def written(folder, **changed):
    told = copy.deepcopy(PLAIN)
    for path, value in changed.items():
        *parents, last = path.split("__")
        place = told
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
    (folder / "one.yaml").write_text(yaml.safe_dump(told), "utf8")
    return design("one", folder)


def test_runs_are_every_combination(tmp_path):
    runs = written(tmp_path).runs
    assert {(run.name, run.noise, run.seed) for run in runs} == {
        (arm, noise, seed) for arm in ("uniform", "cal") for noise in (0.0, 0.5) for seed in (0, 1)
    }
    assert len({run.key() for run in runs}) == 8
    assert len({run.aligned for run in runs}) == 2, "an alignment a seed"
    assert runs[0].key() != runs[0].key("gpu") != runs[0].key("gpu", 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hypothesis": None}, "one.yaml: hypothesis missing"),
        ({"stoping": "never"}, "one.yaml: stoping: there is no such key"),
        ({"endpoints": {"primary": "exact"}}, "endpoints: secondary missing"),
        ({"arms__cal": {"options": {"alpha": 9}}}, "arms: cal: .*alpha=9"),
        ({"arms__cal": {"options": {"alfa": 1}}}, "arms: cal: .*alfa"),
        ({"arms__cal": {"options": {}, "weights": "mine"}}, "weights='mine': expected one of oracle"),
        ({"arms__cal": {"options": {}, "start": "warm"}}, "start='warm': expected one of aligned, cold"),
        ({"arms__cal": {"option": {}}}, "arms: cal: options missing"),
        ({"compare": [["cal", "plain"]]}, "compare: 'cal' and 'plain' share no cell"),
        ({"runs__0__arms": ["cal", "vig"]}, "block 1: there is no arm 'vig'"),
        ({"runs__0__cells": [{"model": "lava"}]}, "block 1: .*model='lava'"),
        ({"runs__0__cells": [{"modle": "llava"}]}, "block 1: .*modle"),
        ({"runs__0__noise": [0, 1.5]}, "noise 1.5.*out of range"),
        ({"runs__0__seeds": [0, 0]}, "a run is asked for twice"),
        ({"runs__0__seeds": None}, "block 1: seeds missing"),
        ({"cut": [{"what": "all"}]}, "cut: why missing"),
        ({"minutes": 3}, "minutes: 3 has no keys"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, **changed)


def test_another_name_is_no_experiment():
    with pytest.raises(ValueError, match="no experiment 'token_kinds' that trains; there are beyond"):
        design("token_kinds")
    assert (HERE / "token_kinds.yaml").exists()


def test_the_same_training_in_two_experiments_is_one():
    keys = {name: {run.key() for run in design(name).runs} for name in ALL}
    assert len(keys["noise"] & keys["types_and_tasks"]) == 20, "two arms, no and a fifth of the answers, five seeds"
    assert not keys["beyond"] & keys["clamp"]
    assert Arm({"alpha": 1}).told() == {"options": {"alpha": 1}}
    assert Arm({}, start="cold").told() == {"options": {}, "start": "cold"}
