"""A tiny model, ready to be scored with."""

import pytest

from tests.support.tiny import tiny_llava, tiny_llava_processor


@pytest.fixture(scope="module")
def model():
    return tiny_llava().eval()


@pytest.fixture(scope="module")
def processor():
    return tiny_llava_processor()
