"""What the tests of malformed records share."""

import pytest

from seecal.data.collators.vision import VisionCollator
from tests.support.sources import images_in, png
from tests.support.tiny import tiny_llava_processor


@pytest.fixture(scope="module")
def collator():
    return VisionCollator(tiny_llava_processor())


@pytest.fixture
def folder(tmp_path):
    """A folder with images, and a picture outside of it."""
    (tmp_path / "secret.png").write_bytes(png())
    return images_in(tmp_path / "images")
