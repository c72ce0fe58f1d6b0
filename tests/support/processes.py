"""Child processes of the tests: the code that they run, how long they may take, and what Ctrl-C does to them."""

import contextlib
import os
import signal
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
