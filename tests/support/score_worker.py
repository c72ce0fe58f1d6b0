"""Scores that are killed or run on several ranks, for tests/scoring/test_restarts.py.

    python -m tests.support.score_worker DATA FOLDER KILLS SEED

Each run is a fork of this process, so that torch is imported once. First one that nothing stops (FOLDER/whole); then
KILLS folders, each begun, killed with SIGKILL after a random part of that run's time, and begun again; then two ranks at
once, and two of which one is killed. Prints what became of the killed as JSON.
"""

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow.parquet  # noqa: F401  # before the fork
import torch

import seecal
from seecal.scoring import run  # noqa: F401
from tests.support.tiny import tiny_llava, tiny_llava_processor


def child(data, out, rank=0, ranks=1):
    """The process id of a run that has begun."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
        with contextlib.redirect_stdout(io.StringIO()):
            seecal.score(
                tiny_llava(),
                data,
                out,
                processor=tiny_llava_processor(),
                records_per_shard=3,
                batch_size=2,
                logprobs=True,
            )
        code = 0
    finally:
        os._exit(code)


def ends(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    data, folder, kills, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    rng = random.Random(seed)
    begin = time.perf_counter()
    assert ends(child(data, folder / "whole")) == 0
    whole = time.perf_counter() - begin
    found = []
    for number in range(kills):
        out = folder / f"killed-{number}"
        pid = child(data, out)
        time.sleep(rng.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        code = ends(pid)
        left = sorted(path.name for path in out.glob("*")) if out.exists() else []
        found.append({"code": code, "left": left, "again": ends(child(data, out))})
    two = [child(data, folder / "two", rank, 2) for rank in range(2)]
    assert [ends(pid) for pid in two] == [0, 0]
    two = [child(data, folder / "two-killed", rank, 2) for rank in range(2)]
    time.sleep(whole / 3)
    os.kill(two[1], signal.SIGKILL)
    [ends(pid) for pid in two]
    assert ends(child(data, folder / "two-killed")) == 0, "and then by one alone"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
