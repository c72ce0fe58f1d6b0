"""seecal demo --compare on the tiny model: what it leaves and prints, how it goes on, that it says no more than it may."""

import io
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from seecal.cli.main import app
from seecal.demo import emoji, files
from seecal.demo.compare import Comparison, compare
from seecal.demo.compared import FIRST, Compared, Row, Tokens, differences, sentences, token_figures
from seecal.demo.measure import Measured
from seecal.demo.paired import Difference
from seecal.demo.plan import COMPARED_QUESTIONS, COMPARED_SHARE, LEAST_STEPS, plan
from seecal.demo.run import carry_out
from seecal.demo.state import DemoOptions, open_state
from seecal.scoring import RecordScores
from tests.support.tiny import tiny_llava, tiny_llava_processor

SEEDS = 2


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A comparison that starts from the tiny model, on a tenth of the drawings."""
    out = tmp_path_factory.mktemp("compare") / "demo"
    return DemoOptions(out, steps=3, batch_size=2, held_out=3, compare=True, seeds=SEEDS)


@pytest.fixture(scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        known = emoji.catalogue()
        some = [item for split in (emoji.TRAIN, *files.HELD_OUT) for item in emoji.by_split(known, split)[:25]]
        patch.setattr(emoji, "catalogue", lambda: tuple(some))
        patch.setattr("seecal.demo.compute.bf16_pays", lambda: (False, "a test"))
        yield patch


def started(options):
    """The folder with the tiny model as the one that ships."""
    open_state(options)
    tiny_llava().save_pretrained(options.out / "start")
    tiny_llava_processor().save_pretrained(options.out / "start")


@pytest.fixture(scope="module")
def made(options, small):
    started(options)
    said = io.StringIO()
    assert compare(options, Console(file=said, width=80)) == 0
    return options.out, said.getvalue()


def test_both_arms_come_from_one_stage_1_and_see_the_same(made):
    out, _ = made
    names = {f"{arm}-{seed}" for arm in ("cal", "uniform") for seed in range(SEEDS)}
    assert {path.parent.name for path in out.glob("*/final")} == {"align", *names}
    for seed in range(SEEDS):
        cal, plain = ((out / f"{arm}-{seed}.yaml").read_text("utf8") for arm in ("cal", "uniform"))
        assert f'model: "{out}/align/final"' in cal
        assert cal.replace("weighting: cal", "weighting: uniform").replace(f"cal-{seed}", f"uniform-{seed}") == plain
        assert f"data-{seed}.json" in cal
    assert (out / "data-0.json").read_text("utf8") != (out / "data-1.json").read_text("utf8")


def test_it_prints_means_intervals_and_the_token_table(made):
    out, said = made
    lines = said.splitlines()
    rows = [line for line in lines if re.match(r"\s+(drawings|concepts) (kind|name|text) ", line)]
    assert len(rows) == 12
    for line in rows:
        assert re.search(r"[+−][\d.]+ to [+−][\d.]+|no item differs", line), line
    tokens = [line for line in lines if re.match(r"\s+(of the image|filler) ", line)]
    assert len(tokens) == 2
    for line in tokens:
        assert re.search(r"\d+ +[+-]\d\.\d\d \d\.\d\d +[+-]\d\.\d\d \d\.\d\d +\d+\.\d\d +\d+\.\d\d", line), line
    assert "…" not in said, "cut off at 80 columns"
    told = json.loads((out / "compare.json").read_text("utf8"))
    assert len(told["rows"]) == 12
    assert told["seeds"] == SEEDS
    measured = [json.loads((out / "measured" / f"cal-{seed}.json").read_text("utf8")) for seed in range(SEEDS)]
    nats = np.mean([[row[3] / row[4] for row in one["held_image/describe"]] for one in measured])
    (row,) = (
        row
        for row in told["rows"]
        if (row["split"], row["question"], row["what"]) == ("held_image", "describe", "filler")
    )
    assert row["first"] == pytest.approx(nats, abs=1e-5)


def test_the_page_shows_both(made):
    out, said = made
    page = (out / "report.html").read_text("utf8")
    assert str(out / "report.html") in said
    for name in ("uniform-0", "cal-0"):
        assert f"{name}/final" in page
    assert page.index("uniform-0/final") < page.index("cal-0/final"), "plain is A"


def test_what_is_stopped_goes_on_and_gives_the_same(made, small, tmp_path):
    """Stopped after stage 1 and an arm; what is finished is not made again, and the figures are those of one go."""
    out, _ = made
    again = tmp_path / "stopped"
    again.mkdir()
    options = DemoOptions(again, steps=3, batch_size=2, held_out=3, compare=True, seeds=SEEDS)
    started(options)

    class Stopped(Comparison):
        def measured(self, name):
            if name == "uniform-0":
                raise KeyboardInterrupt
            return super().measured(name)

    told = io.StringIO()
    assert carry_out(Stopped(options, open_state(options), Console(file=told, width=400))) == 130
    command = f"seecal demo --out {again} --steps 3 --batch-size 2 --held-out 3 --compare --seeds 2"
    assert f"To go on: {command}\n" in told.getvalue()
    assert f"trained so far: {again}/uniform-0/final" in told.getvalue()
    kept = (again / "align" / "final" / "model.safetensors").stat().st_mtime_ns
    assert compare(options, Console(file=io.StringIO(), width=120)) == 0
    assert (again / "align" / "final" / "model.safetensors").stat().st_mtime_ns == kept
    one, other = (json.loads((folder / "compare.json").read_text("utf8")) for folder in (out, again))
    for row, same in zip(one["rows"], other["rows"], strict=True):
        assert row == pytest.approx(same, abs=2e-4)


def test_a_finished_one_is_shown_again_and_other_options_are_refused(made, options, small):
    _, said = made
    again = io.StringIO()
    assert compare(options, Console(file=again, width=80)) == 0
    assert [line for line in again.getvalue().splitlines() if " to " in line] == [
        line for line in said.splitlines() if " to " in line
    ]
    with pytest.raises(ValueError, match=r"started with other options \(seeds\)"):
        compare(DemoOptions(options.out, steps=3, batch_size=2, held_out=3, compare=True), Console(file=io.StringIO()))
    with pytest.raises(ValueError, match=r"started with other options \(compare, seeds\)"):
        open_state(DemoOptions(options.out, steps=3, batch_size=2, held_out=3))
    with pytest.raises(ValueError, match="take --weighting uniform out"):
        compare(DemoOptions(options.out, weighting="uniform", compare=True), Console(file=io.StringIO()))


def test_a_demo_of_before_goes_on(tmp_path):
    """Its state knows nothing of comparisons."""
    open_state(DemoOptions(tmp_path / "old"))
    path = tmp_path / "old" / "demo.json"
    told = json.loads(path.read_text("utf8"))
    told["options"] = {name: value for name, value in told["options"].items() if name not in ("compare", "seeds")}
    path.write_text(json.dumps(told), "utf8")
    open_state(DemoOptions(tmp_path / "old"))
    with pytest.raises(ValueError, match=r"\(compare\)"):
        open_state(DemoOptions(tmp_path / "old", compare=True))


@pytest.mark.parametrize("seeds", [1, 2, 5])
@pytest.mark.parametrize("a_step", [0.4, 2.0])
def test_the_plan_of_a_comparison_fits_the_time(seeds, a_step):
    trainings, seconds, question = 2 * seeds, 600, 0.05
    found = plan(seconds, a_step, question, trainings=trainings)
    measuring = found.held_out * COMPARED_QUESTIONS * (1 + trainings) * question
    spent = a_step * (found.align_steps + trainings * found.tune_steps) + measuring
    if found.steps > LEAST_STEPS:
        assert spent <= seconds + a_step * trainings
        assert spent > 0.8 * seconds or found.held_out == 150
    assert measuring <= COMPARED_SHARE * seconds + 1e-6 or found.held_out == 10
    assert f"steps in each of {trainings} trainings" in found.why


# ---- What it says ----

ITEM = emoji.Emoji("1F600", "grinning face", "a face", (), "1F600", emoji.TRAIN)


def compared(rows, seeds=1, weights=(2.0, 1.0), kinds=("a face", "a dish", "a boat", "a bird")):
    """Of which a quarter of the questions have the commonest answer."""
    asked = [(None, emoji.Answer("?", ((kind, True),))) for kind in kinds]
    answers = {(split, "kind"): asked for split in files.HELD_OUT}
    tokens = {"stage-1": Tokens(9, 9, 1.0, 0.0, *weights)}
    options = DemoOptions(compare=True, seeds=seeds)
    return Compared(options, "a test", 60.0, 5, {}, rows, tokens, answers, [ITEM], "report.html")


def row(key, mean, low, high, first=0.6, sign_p=math.nan):
    return Row(*key, Difference(first, first - mean, mean, low, high, sign_p))


OTHER = ("held_image", "name", "word")


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        (row(FIRST, 0.02, -0.03, 0.07), "This does not tell them apart."),
        (row(FIRST, 0.0, math.nan, math.nan), "This does not tell them apart."),
        (row(FIRST, 0.05, 0.01, 0.09, sign_p=0.2), "This does not tell them apart."),
        (row(FIRST, 0.2, 0.1, 0.3, sign_p=0.01), "This CAL model answers more of them right than the plain one."),
        (row(FIRST, -0.2, -0.3, -0.1, sign_p=0.01), "This CAL model answers fewer of them right than the plain one."),
        (row(FIRST, 0.2, 0.1, 0.25, first=0.2), "too little training to compare anything."),
    ],
)
def test_what_is_judged_is_called_a_difference_only_with_an_interval_that_shows_it(first, expected):
    _, judged, _, _ = sentences(compared([first, row(OTHER, 0.0, -1, 1)]))
    assert judged.endswith(expected)
    if "answers" not in expected:
        assert not re.search(r"\b(more|fewer|better|worse|helps|improves)\b", judged)


def test_one_training_says_nothing_of_others_and_several_do():
    clear = row(FIRST, 0.2, 0.1, 0.3, sign_p=0.01)
    one, several = (sentences(compared([clear, row(OTHER, 0, -1, 1)], seeds)) for seeds in (1, 5))
    assert "say nothing of other trainings" in one[0]
    assert "over trainings and held-out drawings" in several[0]
    assert "Here CAL answers more of them right than plain training." in several[1]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((-0.3, 0.1), "Of the 1 other differences none has an interval without zero."),
        ((-0.3, -0.1), "(unseen drawings: name, nats a word token, CAL lower;"),
        ((0.1, 0.3), "(unseen drawings: name, nats a word token, CAL higher;"),
    ],
)
def test_the_other_figures_are_named_where_they_are_clear_and_with_their_number(ends, expected):
    *_, others, _ = sentences(compared([row(FIRST, 0, -1, 1), row(OTHER, sum(ends) / 2, *ends)]))
    assert expected in others
    assert ("by chance" in others) == ("CAL" in others)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((2.0, 1.0), "2.00 times as much as filler."),
        ((1.02, 1.0), "nearly plain training."),
        ((1.0, 2.0), "not what it is"),
    ],
)
def test_it_says_how_far_cal_was_another_training(weights, expected):
    *_, said = sentences(compared([row(FIRST, 0, -1, 1)], weights=weights))
    assert expected in said


def test_the_differences_are_cal_minus_plain_item_by_item():
    def of(exact, nll):
        ones = np.ones(3)
        return Measured(np.array(exact, float), np.array(nll, float), 2 * ones, ones, ones)

    keys = [(split, question) for split in files.HELD_OUT for question in ("kind", "name", "describe")]
    arms = {
        "cal": [dict.fromkeys(keys, of([1, 1, 0], [2, 4, 6]))],
        "uniform": [dict.fromkeys(keys, of([1, 0, 0], [4, 6, 8]))],
    }
    found = {(row.split, row.question, row.what): row.found for row in differences(arms)}
    assert len(found) == 12
    assert found[FIRST].mean == pytest.approx(1 / 3)
    assert found[OTHER].mean == found[OTHER].low == pytest.approx(-1.0)
    assert (found[OTHER].first, found[OTHER].second) == (2.0, 3.0)


def test_tokens_are_words_of_the_image_by_their_last_character():
    columns = {  # " cat", which ends inside the word; the end of the turn has no characters
        "start": np.array([0, 3, 7, 8]),
        "stop": np.array([3, 7, 8, 8]),
        "delta": np.array([0.0, 4.0, 1.0, -1.0]),
        "weight": np.array([1.0, 4.0, 2.0, 3.0]),
    }
    record = RecordScores("data.json", 0, "held_image/1", columns)
    answer = emoji.Answer("?", (("The ", False), ("cat", True), (".", False)))
    assert token_figures([record], {"held_image/1": answer}) == Tokens(1, 3, 4.0, 0.0, 4.0, 2.0)


def test_seeds_without_compare_are_refused():
    with pytest.raises(ValueError, match="add --compare"):
        app(["demo", "--seeds", "2"], standalone_mode=False)
