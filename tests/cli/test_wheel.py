"""What ``pip install`` of the wheel gives, far from any checkout; torch and the other libraries are this environment's."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from seecal.recipes.layers import SHIPPED
from tests.support.paths import ROOT
from tests.support.processes import environment, limit

UNINSTALLED = {name: value for name, value in environment(COLUMNS="200").items() if name != "PYTHONPATH"}


def run(*command, cwd, code=0):
    command = list(map(str, command))
    done = subprocess.run(command, cwd=cwd, env=UNINSTALLED, capture_output=True, text=True, timeout=limit(2))
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def files_below(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment with the wheel in it, and an empty folder to work in.

    The wheel is made from the sdist, so what the one lacks the other lacks too.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    built = run(sys.executable, "-m", "build", "--no-isolation", source, "--outdir", folder, cwd=folder)
    assert "Package would be ignored" not in built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    assert len(list(folder.glob("*.tar.gz"))) == 1

    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    run(*install, cwd=folder)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    libraries = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    (folder / "work").mkdir()
    return folder / "venv", folder / "work"


def seecal(installed, *arguments, code=0):
    environment, work = installed
    return run(environment / "bin" / "seecal", *arguments, cwd=work, code=code)


def test_the_wheels_code_runs_and_every_file_is_there(installed):
    environment, work = installed
    code = "import seecal, seecal.cli.main as main, torch; print(seecal.__file__, main.__file__, torch.__file__, sep='\\n')"
    ours, command, torch = map(Path, run(environment / "bin" / "python", "-c", code, cwd=work).stdout.splitlines())
    assert environment in ours.parents
    assert environment in command.parents
    assert environment not in torch.parents
    there, here = files_below(ours.parent), files_below(ROOT / "src" / "seecal")
    assert there == here, "pyproject.toml's package-data"
    assert {"py.typed", "__init__.pyi", "demo/emoji_words.json", "recipes/accelerate/fsdp2.yaml"} <= there


def test_help(installed):
    assert "\n  train " in seecal(installed, "--help").stdout
    shown = " ".join(seecal(installed, "train", "--help").stdout.split())
    assert f"{', '.join(sorted(path.stem for path in SHIPPED.glob('*.yaml')))}. (tiny" in shown
    assert "Usage: seecal demo" in seecal(installed, "demo", "--help").stdout


def test_accelerate_configurations_are_found_by_name(installed):
    environment, _ = installed
    path = Path(seecal(installed, "accelerate-config", "fsdp2").stdout.removesuffix("\n"))
    assert environment in path.parents
    assert "fsdp_version: 2" in path.read_text()
    names = [line.split()[0] for line in seecal(installed, "accelerate-config").stdout.splitlines()]
    assert names == ["ddp", "fsdp2", "single", "zero2", "zero3"]
    assert "there are ddp, fsdp2, single, zero2, zero3" in seecal(installed, "accelerate-config", "fsdp", code=2).stderr


def test_benchmarks_need_the_checkout_and_say_so(installed):
    (line,) = seecal(installed, "bench", "step", code=2).stderr.splitlines()
    assert "scripts of the source checkout" in line


def test_the_tiny_recipe_trains(installed):
    _, work = installed
    seecal(installed, "tiny-folder")
    seecal(installed, "train", "--config", "tiny", "--max_steps", "1", "--disable_tqdm")
    final = work / "out" / "tiny" / "run" / "final"
    assert (final / "model.safetensors").exists()
    assert "per_device_train_batch_size" in (final / "recipe.yaml").read_text()
    assert os.listdir(work) == ["out"]
