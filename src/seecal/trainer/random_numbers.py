"""Random numbers that looking at something must not use up."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch


@contextlib.contextmanager
def same_random_numbers(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Random numbers after the block are those without it: of Python, numpy, and torch on the CPU and on ``devices``."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
