"""What is taken a shorter way while a JSONL file is read gives what the longer way gives."""

import json

import pytest

from seecal.data.image_placement import PLACEHOLDER, split_text
from seecal.data.paths import RecordError
from seecal.data.sources.readers import read_jsonl
from seecal.data.sources.rows import as_row, reason


@pytest.mark.parametrize(
    "line",
    [
        b'{"id": "a", "text": "x"}',
        b'{"a": null, "b": [null, {"c": null, "d": 1}]}',
        b'{"a": "null and NaN in a text"}',
        b'{"a": NaN, "b": [NaN]}',
        b'{"a": "\\u0000\\ud800"}',
        b'{"a": "\xed\xa0\x80"}',  # half a surrogate pair as bytes
        b'{"a": "\xff"}',
        b'{"a": 1e999, "b": -0.0}',
        b'{"a": "x"} and more',
        b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}",
        b'{"a": ' + b"[" * 990 + b"]" * 990 + b"}",
        b"[1, 2]",
        b"7",
        b"{\x00}",
        b"{",
    ],
)
def test_the_short_way_through_a_line_gives_the_same(tmp_path, line):
    """As before it was there: every line through json.loads on its bytes, and every row through as_row."""
    (tmp_path / "data.jsonl").write_bytes(line + b"\n")
    ((place, found),) = read_jsonl(tmp_path / "data.jsonl")
    assert place == "line 1"
    try:
        expected = as_row(json.loads(line))
    except (ValueError, RecursionError) as error:
        expected = RecordError(f"not valid JSON ({reason(error)}). Correct or delete the line.")
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    "rest", ["", " ", "\n", "a", "\nWhat? ", "  a <img b ", f"a{PLACEHOLDER}", f"{PLACEHOLDER} a "]
)
def test_a_mark_at_the_start_of_a_text_is_as_one_behind_a_blank(rest):
    """The blank before the mark is dropped by the way that takes any number of marks anywhere."""
    assert split_text(PLACEHOLDER + rest) == split_text(f" {PLACEHOLDER}{rest}")
