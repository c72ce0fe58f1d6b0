"""data/images.py: what every kind of file becomes, and what is refused."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from seecal.data.images.decode import decode_image, open_image


def save(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def pixel(path, at=(0, 0)):
    image = open_image(path)
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_transparent_pixels_become_white_and_half_transparent_ones_mix_with_it(tmp_path):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    path = save(tmp_path, image)
    assert pixel(path) == (255, 255, 255)
    assert pixel(path, (1, 0)) == (127, 127, 127)


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    assert pixel(save(tmp_path, image, "plain.png")) == (10, 20, 30)
    see_through = save(tmp_path, image, "clear.png", transparency=0)
    assert pixel(see_through) == (255, 255, 255)
    assert pixel(see_through, (1, 0)) == (40, 50, 60)


def test_grey_with_alpha_and_one_bit(tmp_path):
    assert pixel(save(tmp_path, Image.new("LA", (1, 1), (100, 0)), "la.png")) == (255, 255, 255)
    assert pixel(save(tmp_path, Image.new("L", (1, 1), 77), "l.png")) == (77, 77, 77)
    assert pixel(save(tmp_path, Image.new("1", (1, 1), 1), "one.png")) == (255, 255, 255)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 100, 100), (65535, 255)])
def test_sixteen_bit_grey_keeps_its_range(tmp_path, value, expected):
    image = Image.fromarray(np.full((1, 1), value, dtype=np.uint16))
    assert pixel(save(tmp_path, image)) == (expected,) * 3


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (np.float32, [-0.5, 0.0, 0.5]),
        (np.float32, [0.0, 1000.0, 2000.0]),
        (np.int32, [-70_000, 0, 70_000]),
        (np.int16, [-200, 0, 200]),
        (np.uint16, [100, 1100, 2100]),  # 12 bits of 16, as cameras and scanners write
    ],
)
def test_numbers_that_are_no_pixels_are_scaled_from_their_own_range(tmp_path, dtype, values):
    path = save(tmp_path, Image.fromarray(np.array([values], dtype=dtype)), "a.tif")
    assert [pixel(path, (at, 0))[0] for at in range(3)] in ([0, 127, 255], [0, 128, 255])
    in_memory = Image.fromarray(np.array([values], dtype=dtype))
    found = [decode_image(in_memory, "it").getpixel((at, 0))[0] for at in range(3)]
    assert found in ([[0, 4, 8]] if dtype is np.uint16 else ([0, 127, 255], [0, 128, 255]))


def test_numbers_without_a_range(tmp_path):
    assert pixel(save(tmp_path, Image.fromarray(np.full((2, 2), 7.5, np.float32)), "same.tif")) == (0, 0, 0)
    odd = np.array([[np.nan, 1.0, 3.0, np.inf, -np.inf]], np.float32)
    path = save(tmp_path, Image.fromarray(odd), "odd.tif")
    assert [pixel(path, (at, 0))[0] for at in range(5)] == [0, 0, 255, 255, 0]
    path = save(tmp_path, Image.fromarray(np.full((2, 2), np.nan, np.float32)), "none.tif")
    with pytest.raises(ValueError, match=r"none\.tif: .*none of its numbers is finite"):
        open_image(path)


@pytest.mark.parametrize("bands", [3, 5])
def test_several_bands_of_numbers_are_refused(tmp_path, bands):
    path = tmp_path / "bands.tif"
    path.write_bytes(tiff_of_floats(bands))
    with pytest.raises(ValueError, match=r"bands\.tif: (not an image that Pillow can read|cannot be opened)"):
        open_image(path)


def tiff_of_floats(bands):
    """A one-pixel TIFF file of that many 32-bit floats, as satellites' images are."""
    pixels = np.zeros(bands, "<f4").tobytes()
    wide = struct.pack(f"<{bands}H", *[32] * bands), struct.pack(f"<{bands}H", *[3] * bands)
    at = 8 + 2 + 10 * 12 + 4
    entries = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, bands, at), (259, 3, 1, 1), (262, 3, 1, 2 if bands == 3 else 1),
               (273, 4, 1, at + 4 * bands), (277, 3, 1, bands), (278, 4, 1, 1), (279, 4, 1, len(pixels)),
               (339, 3, bands, at + 2 * bands)]  # fmt: skip
    header = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    return header + b"".join(struct.pack("<HHII", *entry) for entry in entries) + b"\0" * 4 + b"".join(wide) + pixels


@pytest.mark.parametrize("dtype", ["float32", "int32", "uint16", "int16"])
def test_arrays_of_other_numbers_are_refused_by_name(dtype):
    with pytest.raises(ValueError, match=f"r1: its image is an array of {dtype}, but pixels are whole numbers from 0"):
        decode_image(np.ones((4, 4, 3), dtype), "r1")
    if dtype in ("float32", "int32", "int16"):
        with pytest.raises(ValueError, match=f"an array of {dtype}"):
            decode_image(torch.ones(3, 4, 4, dtype=getattr(torch, dtype)), "r1")
    assert decode_image(np.ones((4, 4, 3), np.uint8), "r1").shape == (4, 4, 3)


def test_cmyk_jpeg(tmp_path):
    red = pixel(save(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "c.jpg", quality=100))
    assert red[0] > 240
    assert max(red[1:]) < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation):
    upright = np.zeros((2, 3, 3), dtype=np.uint8)
    upright[0, 0] = 255  # one white corner, top left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(np.array(open_image(path)), upright)


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert pixel(path) == (255, 0, 0)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.png: no such file"):
        open_image(tmp_path / "gone.png")


def test_folder(tmp_path):
    with pytest.raises(ValueError, match="this is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [(b"hello", "it holds text"), (b"", "empty"), (b"<svg xmlns='x'/>", "SVG"), (b"\0\1\2\xff" * 9, "Pillow can read")],
)
def test_files_that_only_are_called_png(tmp_path, content, hint):
    path = tmp_path / "fake.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=hint) as caught:
        open_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_truncated_file(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"damaged or cut off"):
        open_image(path)


def test_decompression_bomb_is_refused_by_its_header(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match=r"bomb\.png: too large"):
        open_image(path)
    small = save(tmp_path, Image.new("RGB", (20, 20)), "small.png")
    with pytest.raises(ValueError, match="20 × 20 pixels are over the limit of 399"):
        open_image(small, max_pixels=399)
