"""What commands print of data: a terminal shows its control characters and obeys none."""

import json
import sys

import pytest

from seecal.cli import main
from seecal.recipes.tiny import tiny_folder
from seecal.verbosity import written_out
from tests.support.scored import llava_file, scored_folder

ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202er\x9b2J\r"


def said(capsys, monkeypatch, *arguments):
    """(exit code, everything that a command prints); checked to hold nothing that a terminal would obey."""
    monkeypatch.setattr(sys, "argv", ["seecal", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main.main()
    printed = capsys.readouterr()
    text = printed.out + printed.err
    obeyed = {letter for letter in text if ord(letter) < 32 or letter in "\x7f\x9b\u202e"}
    assert obeyed <= {"\n", "\t"}
    return ended.value.code, text


def test_what_is_written_out():
    assert written_out("a\x1b[31m\u202eb\x9bc") == "a⟨U+001B⟩[31m⟨U+202E⟩b⟨U+009B⟩c"
    assert written_out("é 🦊\n\t«x»") == "é 🦊\n\t«x»"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """tiny's model, and data whose ids, source and texts hold what a terminal obeys; one image is half there."""
    place = tmp_path_factory.mktemp("terminal")
    tiny_folder(place / "tiny")
    data = llava_file(
        place / "data", ["a red cat", f"a {ESCAPE} dog", "c", "d"], ids=[f"{ESCAPE}{n}" for n in range(4)]
    )
    data = data.rename(data.parent / f"da{ESCAPE}ta.json")
    image = data.parent / "green.png"
    image.write_bytes(image.read_bytes()[:60])
    return place, data


def test_score_and_calibrate(folder, tmp_path, capsys, monkeypatch):
    place, data = folder
    options = ("--model", place / "tiny" / "model", "--data", data)
    code, text = said(capsys, monkeypatch, "score", *options, "--out", tmp_path / "a", "--on-bad", "skip")
    assert code == 0
    assert "1 rows left out, the first: da⟨U+001B⟩]0;owned" in text
    code, text = said(capsys, monkeypatch, "score", *options, "--out", tmp_path / "b")
    assert code == 2
    assert "record '\\x1b]0;owned" in text
    code, text = said(capsys, monkeypatch, "calibrate", *options, "--batch-size", 2)
    assert code == 2
    assert "damaged or cut off" in text


def test_filter(folder, tmp_path, capsys, monkeypatch):
    _, data = folder
    scores = scored_folder(data, tmp_path / "scores")
    code, text = said(capsys, monkeypatch, "filter", scores, "--out", tmp_path / "o.json", "--min-delta", 0, "--tokens")
    assert code == 0
    rows = json.loads(data.read_text("utf8"))
    (data.parent / "other.json").write_text(json.dumps([*rows, rows[0]]), "utf8")
    code, text = said(
        capsys,
        monkeypatch,
        "filter",
        scores,
        "--out",
        tmp_path / "p.json",
        "--min-delta",
        0,
        "--data",
        data.parent / "other.json",
    )
    assert (code, "another version" in text) == (2, True)


def test_report(folder, tmp_path, capsys, monkeypatch):
    _, data = folder
    scores = scored_folder(data, tmp_path / "scores", delta_of=lambda row, count: [float("nan")] * count)
    code, text = said(capsys, monkeypatch, "report", scores, "--out", tmp_path / "page.html")
    assert code == 0
    assert "1 of 4 records has an image that cannot be opened, the first: da⟨U+001B⟩" in text
    assert "not finite, the first in record '\\x1b]0;owned" in text
    other = scored_folder(data, tmp_path / "other", skipped=[f"{ESCAPE}2"], seed=1)
    code, text = said(capsys, monkeypatch, "report", scores, other, "--out", tmp_path / "page.html")
    assert (code, "other records were left out" in text) == (2, True)
    code, text = said(capsys, monkeypatch, "report", tmp_path / f"no{ESCAPE}where")
    assert (code, "⟨U+001B⟩" in text) == (2, True)
