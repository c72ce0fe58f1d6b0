"""seecal demo on the real weights, short: what it prints, what it leaves, what Ctrl-C leaves, and how it goes on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from tests.support.processes import environment, interruptible, limit

pytestmark = pytest.mark.real

ENVIRONMENT = environment(COLUMNS="100")
SHORT = ["--steps", "4", "--batch-size", "2", "--held-out", "3"]


def seecal(*args, minutes=4, cwd=None):
    command = [sys.executable, "-m", "seecal", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=limit(minutes), cwd=cwd)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "with space"
    return out, seecal("demo", "--out", out, *SHORT)


def test_demo_prints_its_results_and_nothing_else(demo):
    _, done = demo
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for row in ("as shipped", "after stage 1", "after stage 2"):
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith(row))
        assert len(re.findall(r"\d+\.\d\d +\d+%", line)) == 4, line
    assert "<|im_end|>" in done.stdout  # the end of the token table
    for noise in ("Warning", "warning", "de-quantizing", "Traceback", "it/s", "{'loss'"):
        assert noise not in done.stdout


def test_without_a_terminal_it_says_stage_steps_and_loss(demo):
    _, done = demo
    lines = done.stdout.splitlines()
    assert "--steps 4: 1 for stage 1, 3 for stage 2." in lines
    assert "stage 2 of 2 (tune): 3 steps" in lines
    (last,) = (line for line in lines if line.startswith("stage 2 of 2 (tune): step 3 of 3 in"))
    assert re.search(r"loss \d+\.\d\d  Δ [+-]\d+\.\d\d$", last), last


def test_demo_leaves_what_a_user_would_have_written(demo):
    out, _ = demo
    names = ["data.json", "demo.json", "eval.json", "held_out.json", "images", "recipe.yaml", "report.html", "run"]
    names += ["scores", "start"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "run" / "final" / "model.safetensors").exists()
    assert len(list((out / "images").glob("*.png"))) > 1000
    assert len(json.loads((out / "data.json").read_text("utf8"))) == 3 * 2
    assert len(json.loads((out / "eval.json").read_text("utf8"))) == 2 * 2 * 3


def test_both_stages_trained_what_they_should_and_the_word_table_stayed(demo):
    out, _ = demo
    start, first, last = (
        load_file(out / name / "model.safetensors") for name in ("start", "run/stage-1/model", "run/final")
    )
    changed = {name for name in start if not start[name].equal(last[name])}
    assert {name for name in start if not start[name].equal(first[name])} <= {
        name for name in start if "projector" in name
    }
    assert any("projector" in name for name in changed)
    assert sum("language_model" in name and ".layers." in name for name in changed) > 100
    assert not any("embed_tokens" in name or "vision_tower" in name for name in changed)


def test_the_recipe_is_finished_for_seecal_train_too(demo):
    out, _ = demo
    done = seecal("train", "--config", out / "recipe.yaml", "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out / 'run' / 'final'} is there already: this run is finished\n"


@pytest.mark.slow
def test_the_same_recipe_by_seecal_train_gives_the_same_model(demo, tmp_path):
    out, _ = demo
    again = seecal("train", "--config", out / "recipe.yaml", "--output_dir", tmp_path / "mine")
    assert again.returncode == 0, again.stderr
    one, other = (load_file(folder / "final" / "model.safetensors") for folder in (out / "run", tmp_path / "mine"))
    assert one.keys() == other.keys()
    assert max(float((one[name].float() - other[name].float()).abs().max()) for name in one) < 1e-5


def test_the_commands_that_the_demo_names_work(demo):
    _, done = demo
    begin = ("  seecal ", "  python ")
    commands = [line.strip() for line in done.stdout.splitlines() if line.startswith(begin)]
    assert len(commands) == 4
    chat = commands[0].replace("seecal ", f"{shlex.quote(sys.executable)} -m seecal ", 1)
    answered = subprocess.run(chat, shell=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=limit(2))
    assert answered.returncode == 0, answered.stderr
    assert answered.stderr == ""
    assert answered.stdout.endswith("\n")  # after so few steps the answer itself may be empty
    load = commands[1].replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    loaded = subprocess.run(load, shell=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=limit(2))
    assert loaded.returncode == 0, loaded.stderr
    assert "LlavaForConditionalGeneration" in loaded.stdout
    assert "--weighting uniform" in commands[2]
    assert "--steps 4" in commands[2], "as many steps, to be compared"
    assert commands[3].startswith("seecal train --config ")


def test_a_finished_demo_shows_its_results_again_and_other_options_are_refused(demo):
    out, done = demo
    again = seecal("demo", "--out", out, *SHORT)
    assert again.returncode == 0, again.stderr
    table = [line for line in done.stdout.splitlines() if line.strip().startswith(("as shipped", "after stage"))]
    assert [
        line for line in again.stdout.splitlines() if line.strip().startswith(("as shipped", "after stage"))
    ] == table
    assert "step" not in again.stdout.split("Held out")[0]
    other = seecal("demo", "--out", out, *SHORT, "--seed", "1")
    assert other.returncode == 2
    assert "started with other options (seed)" in other.stderr


def test_ctrl_c_leaves_a_model_that_loads_and_the_same_command_goes_on(tmp_path, demo):
    out = tmp_path / "stopped"
    options = ["--out", out, "--steps", "25", "--batch-size", "1", "--held-out", "1"]
    command = [sys.executable, "-u", "-m", "seecal", "demo", *map(str, options)]
    # A terminal's Ctrl-C goes to the whole group; a group of its own keeps it from the test runner.
    with interruptible():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
        )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("stage 2 of 2 (tune): 23 steps"):
            time.sleep(1)
            os.killpg(process.pid, signal.SIGINT)
            break
    stdout, stderr = process.communicate(timeout=limit(2))
    assert process.returncode == 130, stderr
    assert stderr == ""
    stopped, last = ("".join(lines) + stdout).strip().splitlines()[-2:]
    assert "Stopped during stage 2" in stopped
    assert f"To go on: seecal demo --out {out} --steps 25 --batch-size 1 --held-out 1" in stopped
    assert "model" in last
    checkpoint = last.split(": ")[1]
    assert "stage-2/checkpoint-" in checkpoint
    image = next((out / "images").glob("*.png"))
    answered = seecal("chat", checkpoint, image, "What does the picture show?", "--max-new-tokens", 3)
    assert answered.returncode == 0, answered.stderr

    done = seecal("demo", *options)
    assert done.returncode == 0, done.stderr
    assert "stage 1 of 2" not in done.stdout, "a finished stage is not repeated"
    assert "stage 2 of 2 (tune): step 23 of 23" in done.stdout
    metrics = json.loads((out / "run" / "final" / "metrics.json").read_text())["stages"]
    assert [stage["steps"] for stage in metrics] == [2, 23]
