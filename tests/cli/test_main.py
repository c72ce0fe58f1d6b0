"""The command line without a model: help that costs nothing, errors in one line."""

import os
import re
import signal
import subprocess
import sys

import pytest

from seecal.recipes import accelerate_config, accelerate_configs
from tests.support.paths import ROOT
from tests.support.processes import environment, interruptible, limit

COMMANDS = (
    *("demo", "train", "accelerate-config", "tiny-folder", "chat", "families", "bench"),
    *("score", "filter", "calibrate", "report", "eval"),
)
HEAVY = ("torch", "transformers", "trl", "datasets", "PIL")


def seecal(*args, cwd=None):
    command = [sys.executable, "-m", "seecal", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment(COLUMNS="200"), timeout=limit(2)
    )


def refused(*args, cwd=None):
    """Runs a command that must end with exit code 2, nothing on stdout, and one line on stderr, which is returned."""
    done = seecal(*args, cwd=cwd)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("seecal: ")
    return line


@pytest.mark.parametrize("args", [["--help"], [], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(args):
    code = (
        "import sys\nfrom seecal.cli.main import main\n"
        f"sys.argv = ['seecal', *{args!r}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=limit()
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: seecal" in done.stdout


def test_help_lists_the_commands():
    text = seecal("--help").stdout
    for command in COMMANDS:
        assert f"\n  {command} " in text


@pytest.mark.parametrize("asked", [["gpu", "--help"], ["gpu", "-h"], ["evidence", "--help"]])
def test_help_of_a_benchmark_is_its_own(asked):
    done = seecal("bench", *asked)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {asked[0]}.py")


@pytest.mark.parametrize("asked", [[], ["--help"], ["-h"]])
def test_help_of_bench_names_the_benchmarks(asked):
    done = seecal("bench", *asked)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: seecal bench")
    assert "evidence, flops, gpu, loader" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="a process becomes another one")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGINT"])
def test_a_signal_reaches_the_benchmark(tmp_path, name):
    script = "import os, sys, time\nprint(os.getpid(), sys.argv[1:], flush=True)\ntime.sleep(600)\n"
    (tmp_path / "slow.py").write_text(script, encoding="utf8")
    code = (
        "from pathlib import Path\nfrom seecal.cli import bench\n"
        f"bench.FOLDER = Path({str(tmp_path)!r})\nbench.run('slow', ['--out', 'a b'])\n"
    )
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    with interruptible(), subprocess.Popen(command, stdout=pipe, text=True, env=environment()) as started:
        try:
            assert started.stdout.readline() == f"{started.pid} ['--out', 'a b']\n"
            started.send_signal(getattr(signal, name))
            assert started.wait(limit()) == -getattr(signal, name)
        finally:
            started.kill()


def test_launch_lines_name_files_that_are_there():
    read = [*ROOT.glob("docs/*.md"), ROOT / "README.md", *(ROOT / "src" / "seecal" / "recipes").rglob("*.*")]
    text = "\n".join(path.read_text("utf8") for path in read if path.suffix in (".md", ".py", ".yaml"))
    named = re.findall(r"seecal accelerate-config (\w+)", text)
    assert len(named) > 8
    assert set(named) == set(accelerate_configs())
    assert all(accelerate_config(name).exists() for name in named)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["chat", "m", "i.png", "q", "--nope"], "No such option: --nope"),
        (["nope"], "No such command 'nope'"),
        (["chat", "m"], "Missing argument"),
        (["demo", "--steps", "many"], "Invalid value for '--steps'"),
        (["demo", "--minutes", "0"], "Invalid value for '--minutes'"),
        (["demo", "--weighting", "best"], "weighting"),
    ],
)
def test_wrong_usage(args, says, tmp_path):
    assert says in refused(*args, cwd=tmp_path)
    assert not list(tmp_path.iterdir()), "a refused command wrote something"


def test_image_errors(tmp_path, picture):
    assert "no such file" in refused("chat", "model", tmp_path / "none.png", "q")
    assert "this is a folder" in refused("chat", "model", tmp_path, "q")
    text = tmp_path / "text[bold].png"  # brackets: nothing may be read as markup
    text.write_text("not an image")
    line = refused("chat", "model", text, "q")
    assert "it holds text" in line
    assert "text[bold].png" in line


def test_model_errors(tmp_path, picture):
    assert "no such folder" in refused("chat", tmp_path / "none", picture, "q")
    assert "no such folder" in refused("chat", "./none", picture, "q")
    assert "this is a file" in refused("chat", picture, picture, "q")
    assert "no config.json" in refused("chat", tmp_path, picture, "q")
    for inside in ("model", "run/final"):  # the second is looked at first
        (tmp_path / inside).mkdir(parents=True)
        (tmp_path / inside / "config.json").write_text("{}")
        assert f"there is one in {tmp_path / inside}: give that folder" in refused("chat", tmp_path, picture, "q")
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refused("chat", tmp_path, picture, "q")


def test_a_text_model_is_refused_by_name(tmp_path, picture):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert "a llama model takes no images" in refused("chat", tmp_path / "llama", picture, "q")


def test_demo_refuses_to_replace_what_is_not_its_own(tmp_path, picture):
    assert "this is a file" in refused("demo", "--out", picture)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.py").touch()
    assert "not made by the demo" in refused("demo", "--out", tmp_path)
    assert (tmp_path / "model" / "precious.py").exists()


@pytest.fixture
def picture(tmp_path):
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.new("RGB", (8, 8), "red").save(path)
    return path


@pytest.mark.parametrize("damage", ["tokenizer", "head", "weights"])
def test_a_damaged_model_folder_is_one_line(damage, tmp_path, picture):
    from safetensors.torch import load_file, save_file

    from tests.support.tiny import tiny_llava, tiny_llava_processor

    folder = tmp_path / "model"
    tiny_llava().save_pretrained(folder)
    tiny_llava_processor().save_pretrained(folder)
    weights = folder / "model.safetensors"
    if damage == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif damage == "head":
        tensors = load_file(weights)
        name = next(name for name in tensors if "lm_head" in name)
        save_file({**tensors, name: tensors[name][:7].clone()}, weights, metadata={"format": "pt"})
    else:
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert str(folder) in refused("chat", folder, picture, "q")
