"""seecal eval --tasks: what it prints, and what it says where it cannot run."""

import io
import sys

import pytest
from rich.console import Console

from seecal.cli.eval_tasks import notes, refuse_others, table
from seecal.cli.main import app
from seecal.evaluation.lmms_eval import TaskResults, run_tasks


def shown(found):
    console = Console(file=io.StringIO(), width=150)
    console.print(table(found))
    return console.file.getvalue()


def results(limit=None, **scores):
    return TaskResults(scores, dict.fromkeys(scores, 12), {}, {"limit": limit})


def test_the_papers_figures_stand_in_the_line_of_theirs():
    found = results(docvqa_val={"anls": 0.7712}, own={"exact": 0.5})
    lines = shown(found).splitlines()
    (docvqa,), (own,) = ([line for line in lines if name in line] for name in ("docvqa_val", "own"))
    assert "77.1200" in docvqa
    assert "LLaVA-NeXT-7B 75.1 → 77.3" in docvqa
    assert "0.5000" in own
    assert "→" not in own
    assert any("which split is not stated" in note for note in notes(found))


def test_another_figure_of_a_task_is_not_put_beside_the_papers():
    found = results(chartqa={"relaxed_overall": 0.6, "relaxed_human_split": 0.4})
    human = next(line for line in shown(found).splitlines() if "human" in line)
    assert "→" not in human
    assert "0.4000" in human


def test_a_part_of_a_benchmark_is_said_to_be_one():
    found = results(limit=8, ocrbench={"ocrbench_accuracy": 0.004})
    assert any("first 8 documents" in note for note in notes(found))
    assert any("out of 1000" in note for note in notes(found))
    assert not notes(results(own={"exact": 1.0}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "own", "--data", "a.json"], "leave out --data"),
        (["--tasks", "own", "--image-root", "a"], "leave out --image-root"),
        (["--tasks", "own", "--column", "a=b", "--metric", "exact"], "leave out --metric, --column"),
        (["--data", "a.json"], "needs --data, --metric and --out, or --tasks"),
        ([], "needs --data, --metric and --out, or --tasks"),
        (
            ["--data", "a.json", "--metric", "exact", "--out", "b", "--include-path", "c"],
            "name those with --tasks",
        ),
    ],
)
def test_options_of_the_other_half_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        app(["eval", "model", *arguments], standalone_mode=False)


def test_options_that_are_not_given_are_not_told():
    refuse_others({"data": None, "column": []})


def test_without_lmms_eval_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'seecal\[lmms\]'"):
        run_tasks("model", "own")
    with pytest.raises(ImportError, match="not installed here"):
        app(["eval", "model", "--tasks", "own"], standalone_mode=False)
