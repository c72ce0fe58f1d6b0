"""The tiny model and data, and real steps on them with everything counted, once for the folder's tests."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.processes import environment, limit
from tests.support.run_example import run_example

PARTS = ["projector", "language_model"]
JOBS = {
    "llava": ["llava", PARTS, False],
    "llava, checkpointed": ["llava", PARTS, True],
    "llava, projector": ["llava", ["projector"], True],
    "qwen": ["qwen3_vl", [*PARTS, "vision_tower"], False],
    "qwen, checkpointed": ["qwen3_vl", [*PARTS, "vision_tower"], True],
}


@pytest.fixture(scope="package")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    run_example("tiny_folder.py", folder)
    return folder


@pytest.fixture(scope="package")
def counted(tiny):
    """Name of a job -> what was counted in its step, in a process of its own."""
    command = [sys.executable, "-m", "tests.support.counted_step", str(tiny), json.dumps(list(JOBS.values()))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit(), env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(JOBS, json.loads(done.stdout.splitlines()[-1]), strict=True))
