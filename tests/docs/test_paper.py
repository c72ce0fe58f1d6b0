"""docs/paper.md: each of its commands is one that there is, with options that there are, on recipes that resolve."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import typer.main

from seecal import load_records
from seecal.cli.main import app
from seecal.recipes import accelerate_config
from seecal.recipes.help import text
from seecal.recipes.recipe import arguments, read
from tests.support.paths import ROOT
from tests.support.processes import environment, limit

PAGE = (ROOT / "docs" / "paper.md").read_text("utf8")
LINES = [line for block in re.findall(r"```text\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
SEECAL = [line for line in LINES if "seecal " in line]
GROUP = typer.main.get_command(app)


def words_of(line):
    """The words after ``seecal``, of a command that accelerate launches too."""
    launch, found, rest = line.partition("-m seecal ")
    if found:
        (name,) = re.findall(r"\$\(seecal accelerate-config (\w+)\)", launch)
        assert accelerate_config(name).is_file()
        return shlex.split(rest)
    return shlex.split(line)[1:]


def parameters():
    for line in SEECAL:
        yield pytest.param(line, id=re.sub(r"\W+", "-", " ".join(words_of(line)))[:60])


def test_the_page_has_its_commands():
    assert {words_of(line)[0] for line in SEECAL} == {
        *("train", "score", "report", "calibrate", "check-data", "preview", "bench", "build-start", "plan", "eval"),
    }
    assert [line for line in LINES if line not in SEECAL] == [
        line for line in LINES if line.startswith("python examples/")
    ]
    for name in re.findall(r"python (examples/\w+\.py)", PAGE):
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("line", parameters())
def test_a_command_is_one_that_there_is(line):
    name, *rest = words_of(line)
    command = GROUP.commands[name]
    context = command.make_context(name, list(rest))
    if name == "bench":
        script = (ROOT / "benchmarks" / f"{context.params['name']}.py").read_text("utf8")
        assert all(f'"{word}"' in script for word in rest if word.startswith("--"))
    elif name in ("train", "check-data", "preview"):
        if "--dry-run" in rest:
            assert re.search(r"^ +--dry-run ", text(), re.M)
        settings = dict(arguments(context.args)) if name == "train" else {"config": [context.params["config"]]}
        overrides = [(key, one) for key, one in settings.items() if key not in ("config", "resume", "dry_run")]
        recipe = read(settings["config"][0], overrides)
        assert recipe.stages
        for stage in recipe.stages:
            one = read(settings["config"][0], [*overrides, ("bf16", ["false"]), ("use_cpu", ["true"])])
            one.stages[stage.number - 1].config(ROOT / "out")


def test_a_training_does_not_write_where_another_one_does():
    folders = []
    for line in SEECAL:
        name, *rest = words_of(line)
        if name == "train" and "--dry-run" not in rest:
            settings = [(key, value) for key, value in arguments(rest) if key != "config"]
            config = rest[rest.index("--config") + 1]
            folders.append(read(config, settings).output_dir)
    assert len(folders) == len(set(folders)) > 10


def test_every_recipe_of_the_paper_is_on_the_page():
    names = re.findall(r"^\| `(llava[\w.-]+|mgm[\w-]+)`", (ROOT / "docs" / "recipes.md").read_text("utf8"), re.M)
    assert len(names) == 9
    for name in names:
        assert f"`{name}`" in PAGE or f"--config {name}" in PAGE, name


# ---- swapped answers ----


def swap(data, out, *more):
    command = [sys.executable, str(ROOT / "examples" / "swap_answers.py"), str(data), str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=limit())


def conversation(index, turns, image=True):
    said = [{"from": who, "value": f"{who} {index}.{turn}"} for turn in range(turns) for who in ("human", "gpt")]
    return {"id": f"r{index}", **({"image": f"{index}.png"} if image else {}), "conversations": said}


def parts(record, who):
    return [turn["value"] for turn in record["conversations"] if turn["from"] == who]


def test_a_share_of_the_records_has_the_answers_of_others(tmp_path):
    rows = [conversation(i, turns=1 + i % 2, image=i % 5 != 4) for i in range(100)]
    data, out = tmp_path / "data.json", tmp_path / "swapped.json"
    data.write_text(json.dumps(rows))
    done = swap(data, out, "--share", "0.25")
    assert "20 of 100 records" in done.stdout, done
    made = json.loads(out.read_text())
    changed = [index for index, (one, other) in enumerate(zip(rows, made, strict=True)) if one != other]
    assert len(changed) == 20, "a quarter of the 80 with an image"
    for index in changed:
        one, other = rows[index], made[index]
        assert "image" in one
        assert {**one, "conversations": 0} == {**other, "conversations": 0}
        assert parts(one, "human") == parts(other, "human")
        assert not set(parts(one, "gpt")) & set(parts(other, "gpt"))
        (source,) = (n for n in changed if parts(rows[n], "gpt") == parts(other, "gpt"))
        assert source != index
    before, after = (sorted(value for one in found for value in parts(one, "gpt")) for found in (rows, made))
    assert before == after
    again = tmp_path / "again.json"
    swap(data, again, "--share", "0.25")
    assert again.read_bytes() == out.read_bytes()
    swap(data, again, "--share", "0.25", "--seed", "1")
    assert again.read_bytes() != out.read_bytes()


def test_a_share_that_is_none(tmp_path):
    done = swap(tmp_path / "x.json", tmp_path / "y.json", "--share", "20")
    assert done.returncode == 2
    assert "expected a share from 0 to 1" in done.stderr


def test_what_is_written_is_read(tmp_path):
    rows = [conversation(i, turns=1, image=False) for i in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    swap(tmp_path / "data.json", tmp_path / "out.json", "--share", "1")
    assert len(load_records(tmp_path / "out.json")) == 4
