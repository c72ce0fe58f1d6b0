"""What rows say: which cells count, whose learning rate is chosen, and sentences that claim no more than intervals show."""

import json
import re

import numpy as np
import pytest
from experiments.designs import design, names
from experiments.findings import Findings, alignments
from experiments.items import packed
from experiments.trials_page import anchor, by_rate, of_alignment, of_experiment, of_trials, quoted, said

from tests.support.evidence_rows import facts_of, row_of, rows_of

SHAPES = json.dumps({"model": "llava", "task": "shapes"})


def found_in(name, rows):
    return Findings(design(name), rows, alignments(rows.values()))


def better(run):
    """Calibrated weights help where answers are swapped, and nothing else does."""
    return 0.97 if run.name in ("calibrated", "oracle") and run.noise else 0.8 if not run.noise else 0.6


@pytest.fixture(scope="module")
def types():
    return rows_of([design("types_and_tasks")], better)


def test_the_pooled_effect_is_found_and_the_null_is_called_one(types):
    found = found_in("types_and_tasks", types)
    null, effect = (one for one in found.compared() if one.is_pooled)
    assert (null.noise, null.verdict) == (0, "null")
    assert (effect.noise, effect.verdict) == (0.2, "above")
    assert 25 < effect.primary.estimate < 50, "points"
    assert len(effect.cells) == 7
    text = said(found, found.compared())
    assert re.fullmatch(
        r"In exact match, calibrated \(20 % swapped\): \+\S+ \(\+\S+ to \+\S+\) points, more right than uniform; "
        "1 other comparison is a null. NLL of visual tokens is lower in 1 and higher in 0 of 2, "
        "with a fitted temperature it is lower in 1 and higher in 0 of 2.",
        text,
    )


def test_a_null_says_what_it_rules_out():
    rows = rows_of([design("noise")])
    found = found_in("noise", rows)
    assert {one.verdict for one in found.compared()} == {"null"}
    text = said(found, found.compared())
    assert text.startswith(
        "A null in exact match: none of its 3 comparisons can be told from zero after Holm's correction; differences above "
    )
    ends = [max(abs(one.primary.low), abs(one.primary.high)) for one in found.compared()]
    for end in (min(ends), max(ends)):
        assert f"{end:.1f} points (calibrated, " in text
    worse = rows_of([design("noise")], lambda run: 0.4 if run.name == "calibrated" else 0.9)
    found = found_in("noise", worse)
    assert "fewer right than uniform" in said(found, found.compared())
    assert "more right" not in said(found, found.compared())


@pytest.mark.parametrize(
    ("facts", "right"),
    [
        ({"visual": 0.9}, 0.8),  # Δ of visual tokens is small
        ({"visual": 1.5, "filler": 1.6}, 0.8),  # Δ is not of visual tokens
        ({"commonest": 0.95}, 0.8),  # guessing does as well
        ({}, 0.5),  # clean stage 2 is bad
    ],
)
def test_a_cell_that_does_not_see_is_not_counted_and_it_says_so(facts, right):
    def is_bad(run):
        return run.cell == {"model": "llava", "task": "charts"}

    rows = rows_of(
        [design("types_and_tasks")],
        lambda run: right if is_bad(run) and not run.noise else better(run),
        lambda run: facts_of(**facts) if is_bad(run) else None,
    )
    pooled = [one for one in found_in("types_and_tasks", rows).compared() if one.is_pooled]
    assert [len(one.cells) for one in pooled] == [6, 6]
    text = "\n".join([*of_alignment(alignments(rows.values()), []), *of_experiment(found_in("types_and_tasks", rows))])
    assert len(re.findall(r"\| llava charts \|.*\*\*no\*\* \|", text)) == 1
    assert len(re.findall(r"\*\*no\*\* \|", text)) == 1
    assert text.count("llava charts (does not count)") == 2


def test_nothing_is_said_of_cells_that_all_fail():
    rows = rows_of([design("noise")], facts=lambda run: facts_of(visual=0.1))
    found = found_in("noise", rows)
    assert said(found, found.compared()).startswith("Nothing: no cell counts")
    assert quoted(rows) == []


@pytest.fixture(scope="module")
def rates():
    """Calibrated is best at the lowest rate on validation and at the highest on the test set."""
    rows = {}
    for run in design("types_and_tasks").runs:
        row = row_of(run, 0.7)
        # On the test set the rates are the other way round
        value = {2.5e-4: 0.9, 5e-4: 0.7, 1e-3: 0.5}[run.learning_rate] if run.name == "calibrated" else 0.7
        row["validation"]["exact"] = packed({"a": np.arange(40) < 40 * value})["a"]
        row["test"]["exact"] = packed({"a": np.arange(40) >= 40 * value})["a"]
        rows[run.key()] = row
    return rows


def test_the_rate_is_chosen_on_validation_and_among_those_of_both_arms(rates):
    found = found_in("types_and_tasks", rates)
    assert found.rate(SHAPES, 0.2, "calibrated") == 2.5e-4
    assert found.rate(SHAPES, 0.0, "calibrated") == 5e-4
    ours = found.differences("calibrated", "shuffled", SHAPES, 0.2, "test")["exact"]
    assert np.mean(ours) == pytest.approx(0), "shuffled has one rate, so calibrated is taken at that one"


def test_every_rate_is_shown_and_the_pairs_at_one_rate(rates):
    lines = by_rate(found_in("types_and_tasks", rates))
    assert "| cell | swapped | arm | 0.00025 | 0.0005 | 0.001 |" in lines
    ours = next(line for line in lines if line.startswith("| llava shapes | 20 % | calibrated |"))
    assert ours.endswith("| **90.0 %, 10.0 %** | 70.0 %, 30.0 % | 50.0 %, 50.0 % |")
    pairs = next(line for line in lines if line.startswith("| llava shapes | 20 % | calibrated − uniform, points |"))
    # uniform has 30 % of the test set right at every rate
    assert [float(cell.split(" (")[0].replace("−", "-")) for cell in pairs.split(" | ")[3:]] == [-20, 0, 20]
    assert not any("shuffled" in line or " 0 %" in line for line in lines), "they have one rate"


def test_of_rates_that_were_not_run_yet_nothing_is_said(rates):
    one_rate = {key: row for key, row in rates.items() if row["learning_rate"] == 5e-4}
    assert by_rate(found_in("types_and_tasks", one_rate)) == []
    calibrated = {
        key: row for key, row in rates.items() if row["learning_rate"] == 2.5e-4 and row["arm"] == "calibrated"
    }
    lines = by_rate(found_in("types_and_tasks", one_rate | calibrated))
    assert any(line.endswith("| **90.0 %, 10.0 %** | 70.0 %, 30.0 % | – |") for line in lines)
    assert not any("−" in line for line in lines), "uniform has one rate, so there is no pair of several"


def test_rows_that_were_tested_on_other_items_are_no_pair(types):
    row = next(row for row in types.values() if row["arm"] == "calibrated" and row["noise"] == 0)
    with pytest.raises(ValueError, match=f"{row['key']}.*other items: they are no pair"):
        found_in("types_and_tasks", types | {row["key"]: row | {"items": "others"}}).compared()


def test_every_experiment_has_its_section_with_and_without_rows(types):
    empty = "\n".join(of_trials({}))
    assert empty.count("No rows yet: ") == 1 + len(names()), "every experiment, and the cells"
    assert "![" not in empty
    some = dict(list(rows_of([design("noise")]).items())[:-6])
    text = "\n".join(of_experiment(found_in("noise", some)))
    assert "Missing: 6 of 48 runs, so read nothing into it yet." in text
    assert "\n**So far: " in text
    whole = "\n".join(of_experiment(found_in("types_and_tasks", types)))
    assert "So far" not in whole
    for wanted in (
        "seecal bench evidence types_and_tasks",
        "1 thread of a processor",
        "types_and_tasks.svg",
        "Left out: ",
    ):
        assert wanted in whole
    assert "missing, so" not in whole


def test_the_page_begins_with_a_line_for_every_experiment(types):
    """The sentence of its section, and a link that GitHub follows."""
    lines = of_trials(types | rows_of([design("window")]))
    short = lines[lines.index("### In short") :]
    assert f"1 of {len(names())} experiments has a difference in exact match that is clear of zero." in short
    told = [line for line in short if line.startswith("- [")]
    assert len(told) == len(names())
    headings = {anchor(line.removeprefix("### ")) for line in lines if line.startswith("### ")}
    assert {re.match(r"- \[.+\]\(#(.+?)\): ", line)[1] for line in told} <= headings
    assert any("calibrated (20 % swapped): +" in line and "more right than uniform" in line for line in told)
    assert any(line.startswith("- [Pooling](#pooling): A null in exact match") for line in told)
    assert anchor("Δ over a training, and a cold start") == "δ-over-a-training-and-a-cold-start"


def test_what_is_not_whole_is_no_finding(types):
    some = {key: row for key, row in types.items() if row["seed"] < 4}
    lines = of_trials(some)
    assert f"0 of {len(names())} experiments have a difference in exact match that is clear of zero." in lines
    assert any("[Types of model and tasks](#types-of-model-and-tasks): so far: " in line for line in lines)


def test_two_kinds_of_processors_are_said(types):
    key = next(iter(types))
    rows = types | {key: types[key] | {"device": "another"}}
    one, two = ("\n".join(of_experiment(found_in("types_and_tasks", some))) for some in (types, rows))
    assert "the same but for rounding" in two
    assert "the same but for rounding" not in one


def test_the_readme_quotes_every_pooled_comparison_that_is_whole(types):
    others = rows_of([design("more_cells")])
    lines = quoted({**types, **others})
    assert not lines[1], "a blank line before a table"
    assert [line.split(" | ")[0].strip("| ") for line in lines[4:]] == ["`types_and_tasks`"] * 2 + ["`more_cells`"] * 2
    assert "`more_cells`: A null" in lines[0], "what came out null is quoted like the rest"
    assert len(quoted(types)) == 6
    assert quoted(dict(list(types.items())[1:])) == []
    part = dict(list(others.items())[1:])
    assert quoted({**types, **part}) == quoted(types), "nothing of an experiment with missing runs"


def test_delta_over_training_is_shown():
    text = "\n".join(of_experiment(found_in("delta_over_training", rows_of([design("delta_over_training")]))))
    assert "| calibrated | 4 | 3 | 5.00 (0.50 to 1.50) | 0.25 (−0.10 to 0.10) |" in text


def test_beyond_is_judged_on_validation():
    found = found_in("beyond", rows_of([design("beyond")], lambda run: 0.97 if run.name == "annealed" else 0.5))
    # Its cell is known to see from other experiments alone
    assert said(found, found.compared()).startswith("Nothing: no cell counts")
    rows = rows_of([design("beyond"), design("noise")], lambda run: 0.99 if run.name == "annealed" else 0.7)
    found = found_in("beyond", rows)
    assert said(found, found.compared()).startswith("In exact match on validation, annealed (40 % swapped)")
