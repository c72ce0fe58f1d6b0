"""The tiny model and data, once for all tests of a file."""

import pytest

from tests.support.run_example import run_example


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    run_example("tiny_folder.py", folder)
    return folder
