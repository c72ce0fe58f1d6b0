"""docs/scores.md: its commands and its Python run, its columns are those that are written."""

import re
import shlex

import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

import seecal
from seecal import VisionCollator
from seecal.cli.main import app
from seecal.scoring.shards import columns
from tests.support.paths import ROOT
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

PAGE = (ROOT / "docs" / "scores.md").read_text("utf8")
(SHELL,) = re.findall(r"```sh\n(.*?)```", PAGE, re.S)
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the page's commands have been run, in order, and what each printed."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = {
            line: CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False) for line in SHELL.splitlines()
        }
    return folder, said


def output(said, begin):
    (found,) = (result for line, result in said.items() if line.startswith(begin))
    return found.output


def test_the_commands_run(place):
    folder, said = place
    assert len(said) == 9
    assert {line: result.exit_code for line, result in said.items()} == dict.fromkeys(said, 0)
    assert "584 label tokens of 64 records in 1 shards" in output(
        said, "seecal score --model tiny/model --data tiny/data.json --out scores"
    )
    assert re.search(
        r"rows kept \(12 without an image\), \d+ removed: best.json", output(said, "seecal filter scores --out best")
    )
    lost = output(said, "seecal filter scores --out tokens.json")
    assert re.search(r"\d+ of the \d+ label tokens in the rows that stay get weight 0", lost)
    weighted = seecal.load_records(folder / "tokens.json", image_root=folder / "tiny")
    assert sum(weights.count(0.0) for weights in weighted["weights"]) > 0
    assert "what would go" in output(said, "seecal filter scores --out candidates")
    threshold = yaml.safe_load("\n".join(output(said, "seecal filter scores --out best").splitlines()[-2:]))
    assert threshold["weighting"] == "vig"
    assert threshold["threshold"] < 0
    lines = yaml.safe_load(output(said, "seecal calibrate --scores"))
    seecal.CALOptions(**lines)
    assert len(seecal.load_records(folder / "kept.json", image_root=folder / "tiny")) < 64


def test_the_columns_are_those_that_are_written(place):
    folder, _ = place
    named = re.findall(
        r"`(\w+)`", "\n".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    )
    named = [name for name in named if not name.startswith("max")]
    assert named == list(columns(logprobs=True))
    table = pyarrow.parquet.read_table(folder / "scores")
    assert table.column_names == named
    types = {"string": "string", "int64": "int64", "int32": "int32", "bool": "bool", "float32": "float"}
    for line in PAGE.splitlines():
        if line.startswith("| `") and line.split("|")[2].strip() in types:
            for name in re.findall(r"`(\w+)`", line.split("|")[1]):
                assert str(table.schema.field(name).type) == types[line.split("|")[2].strip()], name


def test_the_python_runs(place, monkeypatch, capsys):
    folder, _ = place
    monkeypatch.chdir(folder)
    script, notebook = PYTHON
    exec(script, {})
    assert capsys.readouterr().out.splitlines()[-65] == "64 584 0"
    model, processor = tiny_llava().eval(), tiny_llava_processor()
    names = {
        "seecal": seecal,
        "model": model,
        "processor": processor,
        "record": seecal.load_records(tiny_dataset(1))[0],
    }
    names["batch"] = dict(VisionCollator(processor)(list(tiny_dataset(2))))
    exec(notebook, names)
    assert names["delta"]._repr_html_().count("<bdi") > 10
