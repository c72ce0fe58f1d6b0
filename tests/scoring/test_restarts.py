"""Scores that were stopped, and scores of several ranks, are those of one run that nothing stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest

from seecal.recipes.launch import accelerate_config
from seecal.recipes.tiny import tiny_folder
from tests.scoring.test_score import write_llava
from tests.support.paths import ROOT
from tests.support.processes import environment, interruptible, limit


def shards(folder):
    return {path.name: pyarrow.parquet.read_table(path) for path in sorted(folder.glob("*.parquet"))}


def check_same(folder, whole):
    found = shards(folder)
    assert found.keys() == whole.keys()
    for name, table in whole.items():
        assert found[name].equals(table, check_metadata=True), name
    assert not list(folder.glob(".*.part"))


@pytest.mark.parametrize(
    ("kills", "records"), [(3, 30), pytest.param(20, 60, marks=pytest.mark.slow)], ids=["3 kills", "20 kills"]
)
def test_killed_and_run_again(tmp_path, kills, records):
    data = write_llava(tmp_path / "data", records)
    command = [sys.executable, "-m", "tests.support.score_worker", str(data), str(tmp_path), str(kills), "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=limit(2 + kills / 4), check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    whole = shards(tmp_path / "whole")
    assert sum(table.num_rows for table in whole.values()) > 5 * records
    for number, run in enumerate(found):
        assert run["again"] == 0
        check_same(tmp_path / f"killed-{number}", whole)
    killed = [run for run in found if run["code"] == -signal.SIGKILL]
    assert killed, "none was killed before it had ended"
    assert any(len([name for name in run["left"] if name.endswith(".parquet")]) < len(whole) for run in killed)
    check_same(tmp_path / "two", whole)
    check_same(tmp_path / "two-killed", whole)


def command(tiny, out):
    arguments = ["--model", str(tiny / "model"), "--data", str(tiny / "data.json"), "--out", str(out)]
    return ["-m", "seecal", "score", *arguments, "--records-per-shard", "2", "--batch-size", "1"]


def test_accelerate_launch(tmp_path):
    tiny = tiny_folder(tmp_path / "tiny")
    alone = subprocess.run(
        [sys.executable, *command(tiny, tmp_path / "alone")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=limit(2),
        check=True,
    )
    assert "64 records in 32 shards" in alone.stdout
    config = str(accelerate_config("ddp"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    launcher += ["--main_process_port", "0"]
    done = subprocess.run(
        [*launcher, *command(tiny, tmp_path / "two")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=limit(3),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_same(tmp_path / "two", shards(tmp_path / "alone"))
    assert done.stdout.count("score: 32 records") == 1, "each takes half, the first says how far it is"


def test_ctrl_c_leaves_whole_shards(tmp_path):
    tiny = tiny_folder(tmp_path / "tiny")
    out = tmp_path / "scores"
    with interruptible():
        child = subprocess.Popen(
            [sys.executable, *command(tiny, out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    give_up = time.monotonic() + limit()
    while not list(out.glob("scores-00000[3-9].parquet")) and child.poll() is None and time.monotonic() < give_up:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGINT)
    said, error = child.communicate(timeout=limit())
    if child.returncode == 0:
        pytest.skip("it had ended before it was stopped")
    assert child.returncode == 130, error
    assert "stopped; the shards that are there are whole, and the same command goes on" in said
    assert "Traceback" not in error
    assert 3 <= len(shards(out)) < 32
    assert not list(out.glob(".*.part"))
