"""Images that cannot be used are found while data is loaded, as far as their headers tell."""

import pytest

from seecal.data.sources.load import load_records
from tests.support.sources import images_in, png, row


@pytest.fixture
def folder(tmp_path):
    return images_in(tmp_path / "images")


# What the header shows, while data is loaded; the file is not decoded for it
HEADERS = {
    "no image": (b"no image", "not an image that Pillow can read .it holds text."),
    "damaged": (b"\x89PNG\r\n\x1a\n" + b"\0" * 60, "not an image|cannot be opened"),
    "cut": (png((32, 32))[:20], "not an image|cannot be opened"),
    "too large": (png((10_000, 6_000)), "too large: 10000 × 6000 pixels are over the limit of 50,000,000"),
    "empty": (b"", "0 bytes|the file is empty"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_images_whose_header_cannot_be_used(folder, name):
    content, message = HEADERS[name]
    (folder / "bad.png").write_bytes(content)
    for rows in ([row(image="bad.png"), row(id="good")], [row(image={"bytes": content, "path": None}), row(id="good")]):
        with pytest.raises(ValueError, match=rf"record 'r-9' \(entry 0\): .*({message})") as caught:
            load_records(rows, image_root=folder)
        assert "\n" not in str(caught.value)
        assert load_records(rows, image_root=folder, on_bad="skip")["id"] == ["good"]
