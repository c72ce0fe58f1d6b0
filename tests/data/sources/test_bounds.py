"""What a data file may make this process hold: bounds on a line, an entry, a row, a file in a shard, before it is read."""

import base64
import csv
import io
import json
import sys
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from seecal import LoadReport, load_records
from seecal.data.sources import bounds
from seecal.data.sources.readers import READERS
from seecal.scoring.write_back import write_back
from tests.support.processes import peak_memory
from tests.support.sources import png, row, turn

SMALL = 1 << 16


@pytest.fixture
def small(monkeypatch):
    """Bounds that a test can pass in a moment."""
    monkeypatch.setattr(bounds, "MAX_BYTES", SMALL)
    monkeypatch.setattr(bounds, "MAX_VALUES", 1000)


def rows_of(path):
    return [(place, str(one) if isinstance(one, Exception) else one) for place, one in READERS[path.suffix](path)]


def good(number):
    return {"id": f"good{number}", "conversations": turn("What?")}


LONG = {"id": "long", "conversations": turn("x" * SMALL)}
MANY = {"id": "many", "conversations": [[]] * 1001}
DEEP = '{"id": "deep", "conversations": ' + "[" * 5000 + "]" * 5000 + "}"

# ---- JSON, JSONL ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", ["d.jsonl", "d.ndjson", "d.json"])
def test_a_line_out_of_bounds_is_one_bad_record(tmp_path, small, name, encoding):
    lines = [json.dumps(good(0)), json.dumps(LONG), json.dumps(MANY), DEEP, "[" * 70_000, json.dumps(good(1))]
    (tmp_path / name).write_text("\n".join(lines), encoding)
    report = LoadReport()
    data = load_records(tmp_path / name, on_bad="skip", report=report)
    assert data["id"] == ["good0", "good1"]
    assert [called.rpartition(" (")[2] for called, _ in report.reasons] == ["line 2)", "line 3)", "line 4)", "line 5)"]
    assert all("too large: a record may have 65,536 bytes and 1,000 values" in why for _, why in report.reasons)


def test_a_line_without_an_end_is_not_held(tmp_path, monkeypatch):
    """It is passed over in pieces."""
    monkeypatch.setattr(bounds, "MAX_BYTES", 1 << 22)
    path = tmp_path / "d.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(good(0)).encode() + b"\n")
        file.truncate(1 << 28)  # zeros to the end; takes no room
        file.seek(0, io.SEEK_END)
        file.write(b"\n" + json.dumps(good(1)).encode())
    before = peak_memory(reset=True)
    assert [place for place, _ in rows_of(path)] == ["line 1", "line 2", "line 3"]
    assert peak_memory() - before < 1 << 26


@pytest.mark.parametrize("entry", [json.dumps(LONG), "[" + "[]," * 3000 + "1]", '"' + "x" * (1 << 18), "[" * (1 << 18)])
def test_an_entry_of_a_list_out_of_bounds_ends_it(tmp_path, small, entry):
    (tmp_path / "d.json").write_text(f"[{json.dumps(good(0))},\n {entry}")
    with pytest.raises(
        ValueError, match=r"d\.json: not valid JSON in entry 1 \((it is too large|it ends in the mid|nested)"
    ):
        load_records(tmp_path / "d.json")


def test_what_follows_a_list_is_not_held(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([good(0)]))
    with path.open("ab") as file:
        file.write(b" " * (1 << 27) + b"x")
    before = peak_memory(reset=True)
    with pytest.raises(ValueError, match="something follows the list"):
        load_records(path)
    assert peak_memory() - before < 1 << 26


def test_large_records_in_bounds_are_read_as_before(tmp_path):
    """Images in base64, and many records after a large one."""
    picture = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    text = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    rows = [{**row(id="large"), "image": text}, *(good(number) for number in range(300))]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("d.json", "d.jsonl"):
        assert len(load_records(tmp_path / name)) == 301


# ---- CSV ----


@pytest.mark.parametrize(
    ("name", "sign", "mark"), [("d.csv", ",", ""), ("d.csv", ";", ""), ("d.tsv", "\t", "data:image/png;base64,")]
)
def test_a_field_may_be_as_long_as_an_image(tmp_path, name, sign, mark):
    """csv's own limit is 128 KiB."""
    buffer = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(buffer, "PNG")
    held = mark + base64.b64encode(buffer.getvalue()).decode()
    before = csv.field_size_limit(1 << 17)
    try:
        assert len(held) > csv.field_size_limit()
        data, out = tmp_path / name, tmp_path / f"out-{name}"
        text = f'id{sign}image{sign}text\n1{sign}"{held}"{sign}A\n2{sign}"{held}"{sign}B\n'
        data.write_text(text)
        assert [record["images"][0]["bytes"] for record in load_records(data)] == [buffer.getvalue()] * 2
        csv.field_size_limit(1 << 17)
        write_back(data, out, np.array([True, True]))
        assert out.read_text() == text
        csv.field_size_limit(1 << 40)
        assert len(rows_of(data)) == 2
        assert csv.field_size_limit() == 1 << 40, "what another has set is not made less"
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize("bad", ["x" * (SMALL + 1), "x," * 2000, '"' + "\n" * (SMALL + 1), '"a\n",' * 20_000])
def test_a_row_out_of_bounds_is_a_bad_record(tmp_path, small, bad):
    """One field, many fields, one over many lines, and many over many lines: there it cannot be told where the next row
    begins, and which quote opens."""
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,red\n{bad}\n" + "a.png,blue\n" * 3)
    (tmp_path / "a.png").write_bytes(png())
    report = LoadReport()
    data = load_records(tmp_path, on_bad="skip", report=report)
    assert data[0]["messages"][1]["content"][0]["text"] == "red"
    assert report.rejected >= 1
    assert "too large" in report.reasons[0][1]
    if not bad.startswith('"a'):
        assert [record["messages"][1]["content"][0]["text"] for record in data] == ["red", "blue", "blue", "blue"]


# ---- shards ----


def tar_of(path, *entries, mode="w"):
    """``entries``: (name, content) or a TarInfo."""
    with tarfile.open(path, mode) as tar:
        for entry in entries:
            content = b""
            if not isinstance(entry, tarfile.TarInfo):
                name, content = entry
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def special(name, kind, link=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


GOOD = [("z.png", png()), ("z.txt", b"red")]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_are_no_files(tmp_path, kind):
    """Neither read nor made; a record whose image is one has no image."""
    path = tar_of(tmp_path / "a.tar", special("a.png", kind, "/etc/passwd"), ("a.txt", b"text"), *GOOD)
    report = LoadReport()
    assert load_records(path, on_bad="skip", report=report)["id"][-1] == "z"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("name", ["../../outside.png", "/outside.png", "a/../../outside.png"])
def test_names_lead_nowhere(tmp_path, name):
    (tmp_path / "in").mkdir()
    path = tar_of(tmp_path / "in" / "a.tar", (name, png()), (name.replace("png", "txt"), b"red"), *GOOD)
    assert len(load_records(path)) == 2
    assert [entry.name for entry in tmp_path.rglob("*")] == ["in", "a.tar"]


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_shards_are_refused(tmp_path, mode):
    """A megabyte of gzip may be a gigabyte of tar."""
    path = tar_of(tmp_path / "a.tar", *GOOD, mode=f"w:{mode}")
    with pytest.raises(ValueError, match=r"a\.tar: cannot be read as a WebDataset shard \(it is compressed with"):
        load_records(path)


@pytest.mark.parametrize("size", [SMALL + 1, 1 << 40, -512])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sizes_that_are_not_there_or_are_too_large(tmp_path, small, size, form):
    """The header says so; there are no bytes behind it."""
    entry = tarfile.TarInfo("a.png")
    entry.size = size
    (tmp_path / "a.tar").write_bytes(entry.tobuf(form) + b"\0" * 2048)
    with pytest.raises(ValueError, match=r"a\.tar"):
        load_records(tmp_path / "a.tar", on_bad="skip")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", [-512, -1024])
def test_a_size_that_leads_back(tmp_path, size):
    """The next header would be this one again, or the one before it, without end."""
    path = tar_of(tmp_path / "a.tar", *GOOD)
    entry = tarfile.TarInfo("a.png")
    entry.size = size
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(2048, b"\0") + entry.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match=rf"a\.tar: .*'a.png' has a size of {size}"):
        load_records(path, on_bad="skip")


def sparse(name, size):
    """A file of ``size`` zeros that takes a header alone, in GNU's old form."""
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % size  # the real size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_sparse_files(tmp_path):
    path = tar_of(tmp_path / "a.tar", *GOOD)
    path.write_bytes(sparse("a.png", 4 << 30) + path.read_bytes())
    report = LoadReport()
    before = peak_memory(reset=True)
    assert load_records(path, on_bad="skip", report=report)["id"] == ["z"]
    assert "its file .png is too large" in report.reasons[0][1]
    assert peak_memory() - before < 1 << 27


@pytest.mark.parametrize(
    "name", ["a.npy", "a.npz", "a.pth", "a.pt", "a.pkl", "a.pyd", "a.ten", "a.mp", "a.cbor", "a.txt.gz", "a.json.bz2"]
)
def test_what_others_would_unpack_is_left_alone(tmp_path, name):
    """The builder of `datasets` decodes arrays and tensors and unpacks whatever is compressed."""
    path = tar_of(
        tmp_path / "a.tar", ("a.png", png()), ("a.txt", b"red"), (name, b"garbage that no decoder takes"), *GOOD
    )
    assert load_records(path)["id"] == ["a", "z"]


@pytest.mark.parametrize(
    "content", [json.dumps(LONG).encode(), json.dumps(MANY).encode(), DEEP.encode(), b"\xff", b"{", b'{"id": 1']
)
@pytest.mark.parametrize("ending", ["json", "txt"])
def test_a_file_of_a_record_that_cannot_be_used(tmp_path, small, content, ending):
    if ending == "txt" and content != b"\xff":
        content = b"x" * (SMALL + 1)
    path = tar_of(tmp_path / "a.tar", ("a.png", png()), (f"a.{ending}", content), *GOOD)
    report = LoadReport()
    assert load_records(path, on_bad="skip", report=report)["id"] == ["z"]
    assert report.rejected == 1


def test_two_files_of_one_name(tmp_path):
    path = tar_of(tmp_path / "a.tar", ("a.png", png()), ("a.png", png()), ("a.txt", b"red"), *GOOD)
    report = LoadReport()
    assert load_records(path, on_bad="skip", report=report)["id"] == ["z"]
    assert report.reasons[0][1] == "two files .png. Keep one."


# ---- Parquet ----


def caption_table(texts, **more):
    data = {"text": texts, "image": [png()] * len(texts), **more}
    return pyarrow.table(data)


def test_values_that_a_dictionary_repeats(tmp_path):
    """One text of 64 MiB in a few kilobytes, and 200 rows that mean it: 64 rows at once would be 4 GiB of text."""
    path = tmp_path / "a.parquet"
    one = "x" * (1 << 26)
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 200, pyarrow.int32()), pyarrow.array([one]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 20
    metadata = pyarrow.parquet.read_metadata(path)
    assert metadata.row_group(0).column(0).dictionary_page_offset is not None
    assert bounds.rows_at_once(path, metadata) == 15
    before = peak_memory(reset=True)
    found = next(iter(READERS[".parquet"](path)))
    assert found[0] == "row 0"
    assert peak_memory() - before < 2 << 30


def test_a_value_out_of_bounds_is_one_bad_record(tmp_path, small):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(caption_table(["red", "x" * (SMALL + 1), "blue"]), path)
    report = LoadReport()
    assert len(load_records(path, on_bad="skip", report=report)) == 2
    assert [called for called, _ in report.reasons] == ["a.parquet: record 'a.parquet:1' (row 1)"]
    assert "too large" in report.reasons[0][1]


def test_a_dictionary_that_unpacks_too_far(tmp_path, monkeypatch):
    monkeypatch.setattr(bounds, "_LARGE", 1 << 20)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(caption_table(["x" * (1 << 21)]), path, compression="zstd", use_dictionary=True)
    with pytest.raises(ValueError, match=r"a\.parquet: its column 'text' unpacks from [\d,]+ to 2,097,\d+ bytes"):
        load_records(path)
    pyarrow.parquet.write_table(caption_table(["x" * (1 << 21)]), path, compression="zstd", use_dictionary=False)
    with pytest.raises(ValueError, match=r"its column 'text' unpacks"):
        load_records(path)
    numbers = np.random.default_rng(0).integers(33, 126, 1 << 21, dtype=np.uint8).tobytes().decode()
    pyarrow.parquet.write_table(caption_table([numbers]), path, compression="zstd")
    assert len(load_records(path)) == 1


def test_a_row_of_very_many_values(tmp_path, small):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(caption_table(["red"], numbers=[[0] * 1001]), path)
    with pytest.raises(ValueError, match=r"its column 'numbers.list.element' has 1,001 values in 1 rows"):
        load_records(path)


def test_a_damaged_file_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    numbers = np.random.default_rng(0)
    pyarrow.parquet.write_table(caption_table([f"text {number}" for number in range(200)]), path)
    data = bytearray(path.read_bytes())
    for place in numbers.integers(4, len(data) - 2000, 200):
        data[place] = numbers.integers(0, 256)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: ") as told:
        load_records(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("header", [b"", b"\x15", b"\x15\xff\xff\xff", b"\0" * 24, b"\x16\x04\x15\x04"])
def test_a_page_header_that_cannot_be_read_counts_as_the_largest(header):
    assert bounds._page_sizes(io.BytesIO(header), 0)[0] in (1 << 31, 0)


def test_our_bounds_are_no_smaller_than_what_is_decoded():
    from seecal.data.images.decode import MAX_PIXELS

    assert bounds.MAX_BYTES > MAX_PIXELS * 4 / 3  # a JPEG file of a byte a pixel, in base64
    assert sys.getrecursionlimit() < 5000  # what DEEP above is deeper than
