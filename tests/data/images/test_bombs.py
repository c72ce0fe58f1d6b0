"""Images made to hurt: refused before their pixels are unpacked, in one line, whatever their header says."""

import contextlib
import io
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image

from seecal.data.images import decode
from seecal.data.images.decode import FORMATS, decode_image, open_image
from seecal.data.paths import MAX_FILE_BYTES, RecordError, resolve_inside
from seecal.data.sources.load import load_records
from tests.support.processes import peak_memory
from tests.support.sources import row

LARGE = (9000, 9000)  # pixels; a few kilobytes as a file of one colour


def encoded(kind, size=LARGE, mode="L", **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return bytearray(file.getvalue())


@pytest.fixture
def unpacked(monkeypatch):
    """The sizes of all that is decoded; Pillow's own small palettes aside."""
    sizes = []
    load = Image.Image.load

    def noted(image):
        if image.width * image.height > 1000:
            sizes.append(image.size)
        return load(image)

    monkeypatch.setattr(Image.Image, "load", noted)
    return sizes


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "JPEG", "PPM", "AVIF"])
def test_many_pixels_in_few_bytes(kind, unpacked):
    file = encoded(kind, (400, 300), "RGB" if kind in ("WEBP", "AVIF") else "L")
    unpacked.clear()
    with pytest.raises(ValueError, match=r"too large: 400 × 300 pixels are over the limit of 100,000"):
        decode_image(bytes(file), "r", max_pixels=100_000)
    assert unpacked == []


def icon():
    """One pixel, its header says; inside is an image of 9000 × 9000."""
    inside = encoded("PNG")
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 32, len(inside), 22) + inside


def gif_with_a_small_screen():
    file = encoded("GIF", mode="P")
    file[6:10] = struct.pack("<HH", 10, 10)
    return file


def jp2_with_a_small_box():
    file = encoded("JPEG2000")
    place = file.find(b"ihdr")
    file[place + 4 : place + 12] = struct.pack(">II", 10, 10)
    return file


def jpeg_with_a_second_size():
    small, large = encoded("JPEG", (10, 10)), encoded("JPEG")
    begin = small.find(b"\xff\xc0")
    frame = small[begin : begin + 2 + struct.unpack(">H", small[begin + 2 : begin + 4])[0]]
    place = large.find(b"\xff\xc0")
    return large[:place] + frame + large[place:]


LIARS = [icon, gif_with_a_small_screen, jp2_with_a_small_box, jpeg_with_a_second_size]


@pytest.mark.parametrize("made", LIARS)
def test_headers_that_say_less_than_there_is(made):
    with pytest.raises(ValueError, match=r"too large|not an image|damaged") as told:
        decode_image(bytes(made()), "r")
    assert "\n" not in str(told.value)


def test_a_decoder_that_corrects_the_header(monkeypatch):
    """As Pillow's does for icons: the size after decoding counts too."""
    image = Image.new("L", (4, 4))
    monkeypatch.setattr(type(image), "load", lambda self: setattr(self, "_size", LARGE))
    with pytest.raises(ValueError, match="too large: 9000 × 9000"):
        decode.upright(image, "x")


@pytest.mark.parametrize("in_memory", [True, False])
def test_pillow_images_in_memory_have_the_same_limit(in_memory, unpacked):
    image = Image.new("L", LARGE) if in_memory else Image.open(io.BytesIO(encoded("PNG")))
    unpacked.clear()
    with pytest.raises(ValueError, match="too large: 9000 × 9000"):
        decode_image(image, "r")
    assert unpacked == []


def png_with(kind, data):
    file = encoded("PNG", (4, 4))
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return bytes(file[:33] + chunk + file[33:])


@pytest.mark.parametrize("chunk", ["zTXt", "iTXt", "iCCP"])
def test_texts_and_profiles_that_unpack_to_a_gigabyte(chunk):
    packed = zlib.compress(b"\0" * (1 << 27), 9)
    head = {"zTXt": b"a\0\0", "iTXt": b"a\0\1\0\0\0", "iCCP": b"a\0\0"}[chunk]
    packed_file = png_with(chunk.encode(), head + packed)
    before = peak_memory(reset=True)
    with contextlib.suppress(ValueError):
        assert decode_image(packed_file, "r").size == (4, 4)
    assert peak_memory() - before < 64 << 20


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_many_frames_only_the_first_is_decoded(kind):
    frames = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(200)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    assert decode_image(file.getvalue(), "r").size == (8, 8)
    assert Image.open(file).n_frames > 30


@pytest.mark.parametrize("count", [3, 65_000])
def test_exif_that_is_all_directories(count):
    """A directory that leads to itself, and one of 65,000 entries."""
    entries = b"".join(struct.pack("<HHII", 0x8769, 4, 1, 8) for _ in range(count))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + struct.pack("<I", 8)
    jpeg = encoded("JPEG", (4, 4))
    parts = b"".join(b"\xff\xe1" + struct.pack(">H", len(piece) + 2) + piece for piece in cut(exif))
    assert decode_image(bytes(jpeg[:2] + parts + jpeg[2:]), "r").size == (4, 4)


def cut(data, size=60_000):
    return [data[place : place + size] for place in range(0, len(data), size)]


def test_a_file_without_end(tmp_path):
    """Sparse: it takes no room on the disk. What follows a JPEG file's pixels would be read with it."""
    path = tmp_path / "long.jpg"
    path.write_bytes(encoded("JPEG", (4, 4)))
    os.truncate(path, MAX_FILE_BYTES + 1)
    opened = lambda: open_image(path)  # noqa: E731
    decoded = lambda: decode_image(str(path), "r", tmp_path)  # noqa: E731
    for look in (opened, decoded, lambda: resolve_inside("long.jpg", str(tmp_path))):
        with pytest.raises(ValueError, match=r"too large: 536,870,913 bytes are over the limit of 536,870,912"):
            look()
    with pytest.raises(RecordError, match=r"record 'r-9' .*long.jpg.* is too large: 536,870,913 bytes"):
        load_records([row(image="long.jpg")], image_root=tmp_path)


def test_postscript_is_a_program(monkeypatch, tmp_path):
    """Pillow would hand it to Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was started"))
    file = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(file)
    for value in (file, str(tmp_path / "a.png"), b"\xc5\xd0\xd3\xc6" + file):
        with pytest.raises(ValueError, match=r"not an image that Pillow can read .it is a PostScript program"):
            decode_image(value, "r")
    with pytest.raises(RecordError, match="PostScript"):
        load_records([row(image="a.png")], image_root=tmp_path)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "DDS", "SGI", "ICNS", "IM"])
def test_formats_that_are_not_opened(kind):
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        decode_image(bytes(encoded(kind, (16, 16), "RGB")), "r")


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in ("HEIF", "JXL")])
def test_formats_that_are(kind):
    pixels = np.full((16, 16, 3), 77, np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    found = np.asarray(decode_image(file.getvalue(), "r"))
    assert np.abs(found.astype(int) - 77).max() <= 2


def test_a_plugin_that_somebody_installed_is_used(monkeypatch):
    factory, accept = Image.OPEN["PPM"] if "PPM" in Image.OPEN else (Image.init(), Image.OPEN["PPM"])[1]
    monkeypatch.setitem(Image.OPEN, "HEIF", (factory, lambda start: accept(b"P5") and start.startswith(b"P5")))
    monkeypatch.delitem(Image.OPEN, "PPM")
    monkeypatch.setattr(Image, "init", lambda: None)
    assert decode_image(b"P5 1 1 255\n\x07", "r").size == (1, 1)


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "JPEG2000"])
def test_pixels_that_cannot_be_decoded(kind):
    """AVIF's decoder raises RuntimeError for them."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    data = bytearray(file.getvalue())
    begin = max(data.find({"AVIF": b"mdat", "WEBP": b"VP8 ", "JPEG2000": b"\xff\x93"}[kind]), 0) + 8
    data[begin : begin + 400] = b"\xff" * 400
    with pytest.raises(ValueError, match=r"^r: its image of .*(damaged|cannot be opened)"):
        decode_image(bytes(data), "r")


def test_damage_is_one_kind_of_error_whatever_the_decoder_raises():
    """AVIF's raises RuntimeError, DDS's NotImplementedError, others struct.error or IndexError."""
    numbers = np.random.default_rng(0)
    noise = Image.fromarray(numbers.integers(0, 256, (24, 31, 3), dtype=np.uint8))
    refused = 0
    for kind in ("AVIF", "PNG", "TIFF", "WEBP", "GIF", "JPEG", "JPEG2000", "BMP", "PPM"):
        file = io.BytesIO()
        noise.save(file, kind)
        for _ in range(40):
            data = bytearray(file.getvalue())
            for place in numbers.integers(0, min(len(data), 400), 6):
                data[place] = numbers.integers(0, 256)
            refused += 1
            with contextlib.suppress(ValueError):
                decode_image(bytes(data), "r")
                refused -= 1
    assert refused > 100
