"""A tiny LLaVA and a mixed batch, for every test of the two passes."""

import copy

import pytest

from ..families.builders import MIXED, batch_of, build


@pytest.fixture(scope="module")
def llava():
    return build("llava")


@pytest.fixture
def case(llava):
    model, image_tokens, pixels = llava
    return copy.deepcopy(model).train(), batch_of(MIXED, image_tokens, pixels)
