"""docs/answers.md: its commands and its Python run, its metrics and its keys are those of the code."""

import json
import re
import shlex

import pytest
import yaml
from typer.testing import CliRunner

from seecal import CALConfig
from seecal.cli.main import app
from seecal.evaluation import METRICS
from seecal.evaluation.paper import paper_tables
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "answers.md").read_text("utf8")
(SHELL,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(JSON,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
(YAML,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the page's commands have been run, in order, and what each printed."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = [
            CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False).output for line in SHELL.splitlines()
        ]
    return folder, said


def test_the_commands_say_and_write_what_the_page_says(place, monkeypatch, capsys):
    folder, (_, first, second, third, last) = place
    assert "tiny/eval.json, exact: the answer is a reference" in first
    assert "tiny/eval.json, relaxed:" in second
    assert re.search(r"difference, p = 1\.0000 +\+0\.00", third)
    assert re.search(r"paper: LLaVA-NeXT-7B +33\.7 → 35\.5", last)
    assert sorted(path.name for path in (folder / "answers").iterdir()) == [
        "_manifest.json",
        "predictions.jsonl",
        "result.json",
        "scores.jsonl",
    ]
    assert len((folder / "five" / "predictions.jsonl").read_text("utf8").splitlines()) == 5
    assert json.loads((folder / "answers" / "result.json").read_text("utf8"))["metric"] == "relaxed"
    monkeypatch.chdir(folder)
    exec(PYTHON, {})
    assert re.search(r"^0\.0 0\.0 0\.0 1\.0$", capsys.readouterr().out, re.M)


def test_the_record_of_the_page_can_be_asked(place, monkeypatch, tmp_path):
    folder, _ = place
    (row,) = map(json.loads, JSON.splitlines())
    image = next((folder / "tiny" / "images").iterdir())
    (tmp_path / row["image"]).write_bytes(image.read_bytes())
    (tmp_path / "data.jsonl").write_text(JSON)
    line = f"eval {folder}/tiny/model --data {tmp_path}/data.jsonl --metric anls --out {tmp_path}/out --answers answers"
    said = CliRunner().invoke(app, [*shlex.split(line), "--max-new-tokens", "4"], catch_exceptions=False)
    assert re.search(r"/tiny/model +\d+\.\d\d +\d+\.\d\d … \d+\.\d\d +1 ", said.output)


def test_the_metrics_are_those_of_the_table_and_of_the_help():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.M)
    assert rows == [(name, metric.about) for name, metric in METRICS.items()]
    said = " ".join(CliRunner().invoke(app, ["eval", "--help"], env={"COLUMNS": "300"}).output.split())
    assert ", ".join([*METRICS][:-1]) + f" or {[*METRICS][-1]}." in said


def test_the_keys_are_those_of_the_config():
    fields = CALConfig.__dataclass_fields__
    for name, value in yaml.safe_load(YAML).items():
        assert name in fields
        assert name == "eval_metric" or fields[name].default == value


def test_a_column_and_a_benchmark_that_are_none(tmp_path):
    for extra, message in ((["--column", "x"], "--column x: expected KEY=NAME"), (["--paper", "x"], "Known: ocrbench")):
        line = ["eval", "m", "--data", "d", "--metric", "exact", "--out", str(tmp_path / "out"), *extra]
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(app, line, catch_exceptions=False)


def test_the_papers_tables_name_our_metrics():
    tables = paper_tables()
    assert {one["metric"] for one in tables["benchmarks"].values()} <= METRICS.keys()
    for system, figures in tables["figures"].items():
        assert figures.keys() == tables["benchmarks"].keys(), system
        assert all(row.keys() == {"baseline", "cal"} for row in figures.values())
    seven, thirteen = tables["figures"].values()
    assert (seven["docvqa"]["baseline"], seven["docvqa"]["cal"]) == (75.1, 77.3)
    assert (thirteen["scienceqa"]["baseline"], thirteen["scienceqa"]["cal"]) == (71.8, 71.5)
