"""Two workers on two cores: one thread each, and nothing may reach for a hub. A tiny LLaVA and a mixed batch."""

import copy
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.support.builders import MIXED, batch_of, build
from tests.support.processes import limit

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """No test says how fast a machine has to be: one that hangs is stopped, later where the machine is slow."""
    hangs = pytest.mark.timeout(limit(10))
    for item in items:
        item.add_marker(hangs)


@pytest.fixture(autouse=True)
def _seecal_is_heard():
    """Commands that ran in this process, for another test or in a fixture of a module, have quieted our logger."""
    logging.getLogger("seecal").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def llava():
    return build("llava")


@pytest.fixture
def case(llava):
    model, image_tokens, pixels = llava
    return copy.deepcopy(model).train(), batch_of(MIXED, image_tokens, pixels)
