"""docs/evidence.md is what its rows give, and every experiment was written down before its rows."""

import shutil
import subprocess

import pytest
from experiments.designs import HERE, design, names
from experiments.evidence import MARKS, PAGE, README, Run, cell, expectations, page, readme
from experiments.findings import Findings, alignments
from experiments.pictures import draw
from experiments.rows import RESULTS, Rows
from experiments.runner import pool
from experiments.token_kinds import FIRST, LAST, PLANS, SCORES

from tests.support.evidence_rows import rows_of
from tests.support.paths import ROOT
from tests.support.processes import environment, limit

NAMES = sorted(path.stem for path in RESULTS.glob("*.jsonl"))


def interval(estimate, low, high):
    return {"estimate": estimate, "low": low, "high": high}


def run_of(values, planted=("object", "kind after the name", "filler", "kind", "colour", "count", "negation")):
    """A run in which all is a null but what ``values`` says: (planted, score) -> interval of both kinds of pairs."""
    null = interval(0.5, 0.45, 0.55)
    endpoints = [
        {"planted": kind, "of": score, "tokens": [9, 9]}
        | dict.fromkeys(("matched", "plain"), values.get((kind, score), null))
        for kind in planted
        for score in SCORES
    ]
    endpoints += [{"of": score, "tokens": [9, 9], "plain": interval(0.2, 0.1, 0.3)} for score in SCORES]
    return Run({"endpoints": endpoints})


@pytest.fixture(scope="module")
def trained():
    return pool()


def test_the_page_is_what_the_rows_give(trained):
    assert PAGE.read_text("utf8") == page(Rows("token_kinds").all, Rows("swapped_captions").all, trained), (
        "run python -m experiments.evidence"
    )


def test_the_readme_quotes_what_the_rows_give(trained):
    text = README.read_text("utf8")
    assert readme(text, trained) == text, "run python -m experiments.evidence"
    whole = rows_of([design("types_and_tasks")], lambda run: 0.97 if run.name == "calibrated" else 0.8)
    quoted = readme(text, whole)
    assert quoted.count("| `types_and_tasks` |") == 2
    assert readme(quoted, whole) == quoted
    assert readme(quoted, trained) == text
    with pytest.raises(ValueError, match=f"no {MARKS[0]}"):
        readme("text", trained)


def test_pictures_are_there_where_rows_are(trained, tmp_path):
    known = alignments(trained.values())
    wanted = {f"evidence-{name}.svg" for name in names() if Findings(design(name), trained, known).compared()}
    assert {path.name for path in PAGE.parent.glob("evidence-*.svg")} == wanted, "run python -m experiments.evidence"
    drawn = draw(rows_of([design("noise"), design("window")], lambda run: 0.9), tmp_path)
    assert {"evidence-noise.svg", "evidence-window.svg"} <= {path.name for path in drawn}
    assert all("</svg>" in path.read_text("utf8") for path in drawn)
    before = (tmp_path / "evidence-noise.svg").read_bytes()
    draw(rows_of([design("noise")], lambda run: 0.9), tmp_path)
    assert (tmp_path / "evidence-noise.svg").read_bytes() == before, "the same rows, the same picture"


def test_another_row_gives_another_page():
    rows = Rows("token_kinds").all
    row = next(
        row for row in rows if row.get("design") == "matched" and (row["model"], row["contrast"]) == (LAST, "drop")
    )
    shown = interval(0.123, 0.1, 0.2)
    changed = [{**one, "matched": shown} if "matched" in one else one for one in row["endpoints"]]
    others = [one for one in rows if one is not row]
    found = page([{**row, "endpoints": changed}, *others], Rows("swapped_captions").all, {})
    lines = [line for line in found.splitlines() if line.startswith("| object | ")]
    assert "| " + " | ".join(["**0.123 (0.100–0.200)**"] * len(SCORES)) + " |" in lines[0]
    assert "0.123" not in lines[1]
    assert ("Planned and not run yet: " in found) == (len([one for one in rows if "design" in one]) < len(PLANS))
    assert "drop after stage 2" not in found
    assert "- Did not hold: object and kind are above chance. object by Δ 0.123 (0.100–0.200), below chance;" in found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (interval(0.6, 0.501, 0.7), "**0.600 (0.501–0.700)**"),
        (interval(0.4, 0.3, 0.4999), "**0.400 (0.300–0.500)**"),
        (interval(0.6, 0.5, 0.7), "0.600 (0.500–0.700)"),
        (interval(0.5, 0.4, 0.6), "0.500 (0.400–0.600)"),
        (interval(None, None, None), "–"),
        (None, "–"),
    ],
)
def test_bold_is_what_chance_is_outside_of(given, said):
    assert cell(given) == said


def test_expectations_hold_only_where_the_intervals_say_so():
    above, below = interval(0.7, 0.6, 0.8), interval(0.3, 0.2, 0.4)
    sure = {(kind, score): above for kind in ("object", "kind") for score in ("delta", "gain")}
    held = ["Held", "Held", "Held", "Held", "Did not hold", "Held", "Held"]
    for changed, broken in (
        ({}, []),
        ({("object", "delta"): interval(0.7, 0.49, 0.8)}, [0]),
        ({("count", "logprob_without"): above}, [1]),
        ({("filler", "gain"): below}, [1]),
        ({("kind after the name", "gain"): interval(0.8, 0.7, 0.9)}, [3]),
        ({("kind after the name", "delta"): below}, [2]),
        ({("colour", "delta"): above}, [5]),
        ({("negation", "gain"): above}, [6]),
        ({("negation", "gain"): below}, []),
        ({("object", "gain"): interval(0.8, 0.7, 0.9), ("kind", "gain"): interval(0.71, 0.6, 0.8)}, [4]),
    ):
        expected = [
            {"Held": "Did not hold", "Did not hold": "Held"}[word] if number in broken else word
            for number, word in enumerate(held)
        ]
        lines = expectations({(LAST, "drop"): run_of(sure | changed)})
        assert [line.split(":")[0] for line in lines[:-1]] == expected, changed
    assert "By Δ 0.200 (0.100–0.300), below chance; " in lines[-1]
    assert "apart by 0.800, the lower the likelier visual" in lines[-1]


def git(*arguments):
    """What a git command prints, word by word; none where there is no git or no repository."""
    if shutil.which("git") is None:
        return []
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment(), timeout=limit()
    )
    return done.stdout.split() if done.returncode == 0 else []


def first_with(path, text):
    """The first commit that put ``text`` into a file; None where the history does not show it."""
    found = git("log", "--reverse", "--format=%H", f"-S{text}", "--", path)
    return found[0] if found else None


@pytest.mark.parametrize(
    ("name", "design", "first_row"),
    [
        ("swapped_captions", "question:", '"experiment"'),
        ("token_kinds", "question:", '"experiment"'),
        ("token_kinds", "matched AUROC of", '"design": "matched"'),
        *((name, "hypothesis:", '"experiment"') for name in NAMES if name in names()),
    ],
)
def test_what_is_expected_is_older_than_the_rows(name, design, first_row):
    if git("rev-parse", "--is-shallow-repository") != ["false"]:
        pytest.skip("no git history here, or not all of it")
    plan = first_with(f"experiments/{name}.yaml", design)
    rows = first_with(f"experiments/results/{name}.jsonl", first_row)
    assert plan
    assert rows
    assert plan != rows
    assert git("merge-base", plan, rows) == [plan], "the rows came before what was expected of them"


def test_the_figure_of_the_page_of_scores_is_that_of_the_rows():
    (row,) = [
        row for row in Rows("token_kinds").all if (row["model"], row["contrast"]) == (LAST, "drop") and "design" in row
    ]
    found = Run(row).interval("object", "delta")
    shown = "{estimate:.1f} % of\npairs ({low:.1f} to {high:.1f})".format(
        **{name: 100 * value for name, value in found.items()}
    )
    assert shown in (ROOT / "docs" / "scores.md").read_text("utf8")
    assert cell(Run(row).interval("negation", "delta")) < "**0.5"


def test_the_page_is_linked_and_has_all_experiments():
    for page_ in ("README.md", "docs/scores.md"):
        assert "evidence.md" in (ROOT / page_).read_text("utf8")
    assert set(NAMES) <= {"swapped_captions", "token_kinds", *names()}, "rows of no experiment"
    text = PAGE.read_text("utf8")
    assert all(
        f"[{path.name}](../experiments/{path.name})" in text or f"experiments.{path.stem} " in text
        for path in HERE.glob("*.yaml")
    )
    assert all(f"`seecal bench evidence {name}`" in text for name in names())
    assert FIRST in text
