"""Child processes of the tests: the code that they run, how long they may take, and what Ctrl-C does to them."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import seecal
from tests.support.paths import ROOT

TESTED = Path(seecal.__file__).resolve().parents[1]  # the folder that this process imports seecal from
_UNIT_SECONDS = 0.03  # what _unit takes on one idle core of a server; where it takes longer, the limits are longer


def environment(*paths, **changes):
    """The environment of a child: offline, one thread, and the seecal and tests of this process before any other.

    Args:
        paths: folders that come first in PYTHONPATH.
        changes: further variables.
    """
    path = os.pathsep.join(map(str, [*paths, TESTED, ROOT]))
    if before := os.environ.get("PYTHONPATH"):
        path += os.pathsep + before
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return {**os.environ, **fixed, **changes}


def limit(minutes=1):
    """Seconds after which a child hangs: ``minutes`` of a machine as fast as ours, more on a slower or busier one."""
    begin = time.perf_counter()
    _unit()
    return 60 * minutes * max(1.0, (time.perf_counter() - begin) / _UNIT_SECONDS)


def _unit():
    """A fixed piece of work, Python and torch in turns as in the tests."""
    matrix = torch.eye(64)
    for _ in range(2000):
        matrix = matrix @ matrix
        sum(range(1000))


def two_ranks(*arguments, cwd=ROOT, minutes=2):
    """A launch of two CPU ranks that has ended well. ``arguments``: a script, or -m and a module, and its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, *map(str, arguments)],
        cwd=cwd,
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=limit(minutes),  # a hang is one of the things to catch
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def peak_memory(reset=False):
    """Bytes that this process has had at most, if ``reset`` from now on; Linux."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@contextlib.contextmanager
def interruptible():
    """A child started in here is stopped by SIGINT, also where this process was started with SIGINT ignored.

    That is inherited: ``make test &`` in a script starts the tests so, and Python then installs no handler of its own.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
