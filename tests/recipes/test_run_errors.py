"""seecal train: what is wrong with a recipe, its data or its folder is one line."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from seecal.cli import main as cli
from seecal.recipes import run as train
from seecal.recipes.folder import RunFolder
from seecal.recipes.recipe import read
from seecal.recipes.stage_runner import StageRunner
from tests.support.processes import environment, limit
from tests.support.recipe_files import recipe_file

ENVIRONMENT = environment(PYTHONUNBUFFERED="1")


def refused(monkeypatch, capsys, *args):
    """The one line on stderr of a command that must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["seecal", "train", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 2
    (line,) = [line for line in said.err.splitlines() if line]
    return line


def damaged(tiny, folder, change):
    rows = json.loads((tiny / "data.json").read_text())
    change(rows[2])
    (folder / "bad.json").write_text(json.dumps(rows))
    return folder / "bad.json"


RECORDS = {
    "image count": (lambda row: row["conversations"][0].update(value="<image><image> What?"), "r2"),
    "no such image": (lambda row: row.update(image="images/none.png"), "r2"),
    "empty answer": (lambda row: row["conversations"][1].update(value=""), "r2"),
    "no labels": (lambda row: row.update(conversations=row["conversations"][:1]), "r2"),
}


def test_an_image_too_large_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "large.png")
    rows = json.loads((tiny / "data.json").read_text())[2:3]
    rows[0]["image"] = "large.png"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    file = recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / "out", data=str(tmp_path / "data.json"))
    line = refused(monkeypatch, capsys, "--config", file, "--dataloader_num_workers", "1")
    assert "large.png" in line
    assert "10000 × 6000 pixels" in line
    assert "Error" not in line


@pytest.mark.parametrize("image", ["none.png", "../none.png"])
def test_a_bad_record_in_a_worker_is_one_line(image, tiny, tmp_path, monkeypatch, capsys):
    row = {"id": "lost", "image": image}
    row["conversations"] = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "It."}]
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    file = recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / "out", data=str(tmp_path / "data.jsonl"), max_steps=1)
    line = refused(monkeypatch, capsys, "--config", file, "--streaming", "--dataloader_num_workers", "1")
    assert "seecal: data.jsonl: record 'lost' (line 1)" in line
    assert "Traceback" not in line


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_an_output_folder_that_cannot_be_made_is_one_line(name, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    file = recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / name)
    assert name in refused(monkeypatch, capsys, "--config", file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_says_what_to_set(tiny, tmp_path):
    file = recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / "out", use_cpu=False, bf16=True)
    with pytest.raises(ValueError, match="no GPU was found here: set use_cpu: true and bf16: false"):
        train.run(["--config", file])


@pytest.mark.parametrize("what", RECORDS)
def test_a_bad_record_is_one_line_that_names_it(what, tiny, tmp_path, monkeypatch, capsys):
    change, names = RECORDS[what]
    file = recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / "out", max_steps=1)
    data = {"path": str(damaged(tiny, tmp_path, change)), "image_root": str(tiny)}
    line = refused(monkeypatch, capsys, "--config", file, "--data", json.dumps(data))
    assert names in line


MISTAKES = {
    "unknown key": (["--learning_rat", "1e-5"], "learning_rat: no such key. Did you mean learning_rate?"),
    "wrong type": (["--max_steps", "many"], "max_steps: expected a whole number, got 'many'"),
    "wrong config": (["--config", "none.yaml"], "--config none.yaml: no such file"),
    "wrong data": (["--data", "none.json"], "none.json: no such file"),
    "wrong model": (["--model", "./none"], "./none: no such folder"),
    "contradiction": (["--alpha", "9"], "alpha=9.0, beta=5.0"),
    "lora beside whole": (["--train", "lora", "language_model"], "train: lora and language_model"),
    "group that does not train": (["--learning_rates.vision_tower", "1e-6"], "learning_rates: vision_tower"),
    "too long": (["--max_length", "20"], "record 'r"),
    "all too long": (["--max_length=20", "--on_long=drop", "--logging_steps=1"], "no logged step had a label token"),
    "two recipes": (["--config", "a.yaml", "--config", "b.yaml"], "--config takes one file"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_2(what, tiny, tmp_path, monkeypatch, capsys):
    arguments, says = MISTAKES[what]
    file = recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / "out", max_steps=1)
    before = [] if "--config" in arguments else ["--config", file]
    assert says in refused(monkeypatch, capsys, *before, *arguments)
    # What was refused before it began does not stand in the way of the next try.
    if what in ("wrong model", "too long"):
        assert train.run(["--config", file]) == 0


FOUR = {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True, "bnb_type": "nf4"}}}
LATER = {  # the second stage's settings, the run's own, and what is said
    "scores that are not there": ({"weights": "gone"}, {}, "weights: gone: no such folder"),
    "a folder without scores": ({"weights": "."}, {}, "no _manifest.json here, so these are no scores"),
    "a reference": (
        {"weighting": "prior", "prior_reference": "./gone"},
        {},
        "prior_reference: ./gone: no such folder",
    ),
    "a logger": ({"report_to": "wandbb"}, {}, "wandbb is not supported"),
    "a logger that is not installed": (
        {"report_to": "neptune"},
        {},
        "report_to='neptune': its package is not installed",
    ),
    "an optimizer": ({"optim": "lomo", "optim_args": "fast"}, {}, "stage 2: optim: lomo: "),
    "a schedule": ({"lr_scheduler_type": "cosine_with_min_lr"}, {}, "lr_scheduler_type: cosine_with_min_lr: "),
    "a tower that is shared": ({"cache_vision_features": True}, {}, "the ranks share the tower's weights (FSDP)"),
    "a setting of the processor": ({"processor_kwargs": {"max_pixel": 9}}, {}, "has no setting 'max_pixel'"),
    "an argument of the 4 bits": ({"lora": {}}, FOUR, "quantization_config.bnb_type: no such argument"),
    "a tower that changes": ({"cache_vision_features": True}, {}, "attention_dropout is 0.5, so features vary"),
}


@pytest.mark.parametrize("what", LATER)
def test_what_a_later_stage_cannot_do_is_told_before_the_first_trains(what, tiny, tmp_path, monkeypatch):
    """And a mended recipe may begin in the same folder."""
    settings, own, says = LATER[what]
    monkeypatch.setattr(StageRunner, "train", lambda *given: pytest.fail("a stage trains"))
    if what == "a tower that is shared":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    if what == "a tower that changes":
        own = {"model": str(changing_tower(tiny, tmp_path / "model"))}
    stages = [{"train": "projector"}, settings]
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "out", max_steps=1, stages=stages, **own)
    with pytest.raises((ValueError, OSError), match=re.escape(says)):
        train.run(["--config", file])
    assert RunFolder(read(file)).check(resume=False) == []


def changing_tower(tiny, folder):
    """The tiny model with dropout in its tower's attention."""
    shutil.copytree(tiny / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["attention_dropout"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_whole_command_line_once(tmp_path):
    command = [sys.executable, "-m", "seecal", "train", "--config", "tiny", "--beta", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=limit(2))
    assert done.returncode == 2
    assert done.stderr == (
        "seecal: alpha=1.0, beta=0.5: Δ is clamped to [alpha, beta], so 0 <= alpha <= beta is needed\n"
    )


@pytest.mark.parametrize("name", ["file", "others"])
def test_an_output_folder_that_is_not_ours(name, tiny, tmp_path):
    (tmp_path / "others").mkdir()
    for path in (tmp_path / "file", tmp_path / "others" / "notes.txt"):
        path.write_text("mine")
    file = recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / name)
    with pytest.raises(ValueError, match="this is a file" if name == "file" else "holds other files"):
        train.run(["--config", file])


@pytest.mark.parametrize("text", ["", "stages: [", "model: m"])
def test_a_damaged_recipe_of_a_run_is_one_line(text, tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / "stage-1" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    file = recipe_file(tmp_path / "recipe.yaml", tiny, tmp_path / "run")
    assert "recipe.yaml is damaged" in refused(monkeypatch, capsys, "--config", file, "--resume")
