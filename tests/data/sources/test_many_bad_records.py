"""Thousands of malformed records in one file: each is named and counted, and the good ones are all there."""

import json
import random

import pytest

from seecal.data.sources.formats import FORMATS
from seecal.data.sources.load import LoadReport, load_records
from tests.support.sources import messages, row, turn, write_json


def broken(choose, good):
    """``good`` with something wrong in it, or nearly so: any value anywhere may be anything."""
    odd = [None, "", " ", 0, -1, 1.5, True, [], {}, [[]], [None], {"a": {}}, float("nan"), ["red.png"], "HUGE"]
    odd += ["\ud800", "\0", "<image>", "a" * 10_000, "\n\r\u2028", "tool"]
    odd += ["../secret.png", "http://a/b.png", "red.png/", "gone.png"]
    value = json.loads(json.dumps(good))
    for _ in range(choose.choice([1, 1, 1, 2, 4])):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = choose.choice(keys)
            if isinstance(at[key], (dict, list)) and choose.random() < 0.7:
                at = at[key]
                continue
            if choose.random() < 0.3:
                del at[key]
            elif isinstance(at, dict) and choose.random() < 0.15:
                at[choose.choice(["", "images", "image", "role", "type", "id"])] = at.pop(key)
            else:
                at[key] = json.loads(json.dumps(choose.choice(odd)))
            break
    return value


def spoiled(choose, line):
    """A line of a file as a broken disk or a careless script leaves it."""
    line = bytearray(line)
    kind = choose.randrange(4)
    if kind == 0:
        del line[choose.randrange(1, len(line)) :]
    elif kind == 1:
        line[choose.randrange(len(line))] = choose.choice([0, 0xFF, 0x80, ord('"'), ord("{")])
    elif kind == 2:
        line = bytearray(choose.choice([b"null", b"[]", b"3", b"[" * 5000, b"{" * 5000, b"NaN", b"\xff\xfe", b'"a"']))
    return bytes(line)


FUZZED = {
    "llava": {"id": "a", "image": "red.png", "conversations": turn()},
    "sharegpt": {"id": "a", "images": ["red.png", "blue.png"], "system": "s", "conversations": turn("<image><image>c")},
    "messages": {"id": "a", "images": ["red.png"], "messages": messages([("<image>a", "b"), ("c", "d")])},
    "prompt_completion": {"id": "a", "image": "red.png", "prompt": "a", "completion": "b"},
    "captions": {"id": "a", "file_name": "red.png", "text": "a", "prompt": "b"},
}


@pytest.mark.parametrize("format", FUZZED)
def test_thousands_of_malformed_records(folder, collator, format, caplog):
    assert set(FUZZED) == set(FORMATS)
    caplog.set_level("CRITICAL")
    choose = random.Random(format)
    lines = [json.dumps(FUZZED[format]).encode()]
    for _ in range(2000):
        line = json.dumps(broken(choose, FUZZED[format])).encode() if choose.random() < 0.8 else lines[0]
        line = line.replace(b'"HUGE"', b"9" * 5000)  # more digits than Python reads
        lines.append(spoiled(choose, line) if choose.random() < 0.3 else line)
    lines = [line for line in lines if line.strip() and b"\n" not in line]
    path = folder / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = LoadReport()
    data = load_records(path, on_bad="skip", report=report)
    assert report.format == format
    assert report.accepted + report.rejected == report.total == len(lines)
    assert len(data) == report.accepted > 200
    assert report.rejected > 200
    for called, reason in report.reasons:
        assert "\n" not in called + reason
        assert len(called + reason) < 700
    # What was let through can be used: its text may still hold the model's own image token.
    for record in data.select(range(0, len(data), 10)):
        try:
            collator([record])
        except ValueError as error:
            assert "must not contain '<image>' itself" in str(error)  # noqa: PT017


def test_malformed_lists_and_tables(folder):
    choose = random.Random(0)
    rows = [row(id=index) if choose.random() < 0.5 else broken(choose, row(id=index)) for index in range(500)]
    report = LoadReport()
    load_records(write_json(folder / "d.json", rows), format="llava", on_bad="skip", report=report)
    assert report.total == 500
    good = "red.png,a square\n"
    odd = [
        "red.png\n",
        "red.png,a,b\n",
        "gone.png,a\n",
        "red.png,\n",
        ",\n",
        '"red.png"x,a\n',
        "\0,a\n",
    ]
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(good + one + good for one in odd) + good * 3)
    load_records(folder / "metadata.csv", on_bad="skip", report=report)
    assert (report.accepted, report.rejected) == (2 * len(odd) + 3, len(odd))
    (folder / "metadata.csv").write_text(f'file_name,text\n{good}red.png,"a\n{good}')
    with pytest.raises(
        ValueError, match=r"record 'metadata.csv:1' \(line 4\): not valid CSV \(unexpected end of data\)"
    ):
        load_records(folder / "metadata.csv")
    (folder / "metadata.csv").write_bytes(b"file_name,text\nred.png,a\nred.png,\xff\n")
    load_records(folder / "metadata.csv", on_bad="skip", report=report)
    assert (report.accepted, report.rejected) == (1, 1)
    assert "not valid UTF-8" in report.reasons[0][1]
