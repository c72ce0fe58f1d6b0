"""seecal demo on the real weights, short: what it prints, what it leaves, and what Ctrl-C leaves."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.support.processes import environment, interruptible, limit

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("demo")]

ENVIRONMENT = environment(COLUMNS="100")
SHORT = ["--align-steps", "2", "--tune-steps", "2", "--batch-size", "2", "--held-out", "3"]


def seecal(*args):
    command = [sys.executable, "-m", "seecal", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=limit(4))


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
    for noise in ("Warning", "warning", "de-quantizing", "Traceback", "it/s"):
        assert noise not in done.stdout


def test_demo_leaves_a_model_and_images(demo):
    out, _ = demo
    assert sorted(path.name for path in out.iterdir()) == ["images", "model"]
    assert (out / "model" / "model.safetensors").exists()
    assert len(list((out / "images").glob("*.png"))) > 1000


def test_the_commands_that_the_demo_names_work(demo):
    _, done = demo
    commands = [line.strip() for line in done.stdout.splitlines() if line.startswith(("  seecal ", "  python "))]
    assert len(commands) == 3
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


def test_ctrl_c_leaves_a_model_that_loads(tmp_path, demo):
    out = tmp_path / "stopped"
    command = [sys.executable, "-u", "-m", "seecal", "demo", "--out", out, "--align-steps", "500", "--held-out", "2"]
    command += ["--batch-size", "1"]
    # A terminal's Ctrl-C goes to the whole group; a group of its own keeps it from the test runner.
    with interruptible():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
        )
    deadline = time.monotonic() + limit(3)
    while not list(out.glob("trainer-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=limit(2))
    assert process.returncode == 130, stderr
    assert stderr == ""
    last = stdout.strip().splitlines()[-1]
    assert "Stopped during stage 1" in last
    assert "model" in last
    assert sorted(path.name for path in out.iterdir()) == ["images", "model"]
    image = next((out / "images").glob("*.png"))
    answered = seecal("chat", out / "model", image, "What does the picture show?", "--max-new-tokens", 3)
    assert answered.returncode == 0, answered.stderr
