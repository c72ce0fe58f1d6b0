"""A report page of scores whose images have gone, been damaged or been replaced since, and the budget of the others."""

import json
import shutil

import pytest
from PIL import Image

import seecal
from tests.pages.test_report import made, parsed
from tests.support.chromium import page_of
from tests.support.scored import llava_file, scored_folder
from tests.support.tiny import tiny_image

ANSWERS = [f"word{number}" for number in range(8)]  # red, green, blue, yellow, and again


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Charts take a second a page, and are tested elsewhere."""
    monkeypatch.setattr("seecal.pages.report.distribution", lambda *_: {"light": "", "dark": ""})


def lost(folder):
    return json.loads(parsed(folder / "page.html").scripts["lost"])


@pytest.mark.parametrize("how", ["removed", "moved away", "a folder in its place"])
def test_a_missing_image_is_named_and_counted(tmp_path, how):
    data, scores = made(tmp_path, ANSWERS)
    image = data.parent / "blue.png"
    image.rename(tmp_path / "elsewhere.png") if how == "moved away" else image.unlink()
    if how == "a folder in its place":
        image.mkdir()
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.records, report.images, len(report.missing), report.damaged) == (8, 6, 2, [])
    (note,) = report.notes
    assert note.startswith("2 of 8 records have an image that is missing, the first: data.json: record 'r2' (")
    assert f"image 'blue.png' is not {'a file' if image.exists() else 'in'}" in note
    assert lost(tmp_path) == {"2": "image missing: 'blue.png'", "6": "image missing: 'blue.png'"}
    assert json.loads(parsed(tmp_path / "page.html").scripts["index"])["questions"][2] != [""]


@pytest.mark.parametrize("keep", [0, 20, 60], ids=["empty", "no header", "half a file"])
def test_an_image_that_is_damaged_by_now(tmp_path, keep):
    data, scores = made(tmp_path, ANSWERS)
    image = data.parent / "green.png"
    image.write_bytes(image.read_bytes()[:keep])
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.images, report.missing, len(report.damaged)) == (6, [], 2)
    assert report.notes[0].startswith(
        "2 of 8 records have an image that cannot be opened, the first: data.json: record 'r"
    )
    assert lost(tmp_path)["1"] == "image cannot be opened: 'green.png'"


def test_an_image_of_another_size_is_shown_and_one_too_large_is_damaged(tmp_path, monkeypatch):
    data, scores = made(tmp_path, ANSWERS)
    tiny_image("red").resize((90, 400)).save(data.parent / "red.png")
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.images, report.notes) == (8, [])
    Image.new("1", (8000, 8000)).save(data.parent / "red.png")
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.images, len(report.damaged)) == (6, 2)
    assert "too large" in report.notes[0]


def test_all_images_gone(tmp_path):
    data, scores = made(tmp_path, ANSWERS)
    for image in data.parent.glob("*.png"):
        image.unlink()
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.images, len(report.missing)) == (0, 8)
    with pytest.raises(
        ValueError, match=r"image_root='.*nowhere' has none of the images of 8 records, the first: data.js"
    ):
        seecal.report(scores, out=tmp_path / "page.html", image_root=tmp_path / "nowhere")


def test_images_in_a_folder_of_their_own_that_has_moved(tmp_path):
    data = llava_file(tmp_path / "data", ANSWERS)
    (tmp_path / "images").mkdir()
    for image in data.parent.glob("*.png"):
        image.rename(tmp_path / "images" / image.name)
    scores = scored_folder(data, tmp_path / "scores", image_root=tmp_path / "images")
    (tmp_path / "images").rename(tmp_path / "moved")
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.images, len(report.missing)) == (0, 8), "the data is there, only its images are not"
    assert seecal.report(scores, out=tmp_path / "page.html", image_root=tmp_path / "moved").images == 8


def test_rows_that_were_bad_when_they_were_scored(tmp_path):
    data = llava_file(tmp_path / "data", ANSWERS)
    blue = data.parent / "blue.png"
    kept = blue.read_bytes()
    blue.unlink()
    scores = scored_folder(data, tmp_path / "scores")
    (data.parent / "red.png").unlink()
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.records, report.images, len(report.missing), report.skipped) == (6, 4, 2, 2)
    blue.write_bytes(kept)
    with pytest.raises(
        ValueError, match=r"another version of .* Also, an image cannot be used: data.json: record 'r0' .*red"
    ):
        seecal.report(scores, out=tmp_path / "page.html")


def test_a_set_in_memory(tmp_path):
    data, _ = made(tmp_path / "a", ANSWERS)
    records = seecal.load_records(data)
    scores = scored_folder(records, tmp_path / "scores")
    (data.parent / "green.png").unlink()
    report = seecal.report(scores, out=tmp_path / "page.html", data=records)
    assert (report.images, len(report.missing)) == (6, 2)
    assert "record 'r1' (row 1): image '" in report.notes[0]


def test_filter_names_the_image_too(tmp_path):
    data, scores = made(tmp_path, ANSWERS)
    shutil.copy(data.parent / "blue.png", tmp_path)
    (data.parent / "blue.png").unlink()
    with pytest.raises(
        ValueError, match=r"an image has gone or been damaged since .* record 'r2' .*'blue.png' is not in"
    ):
        seecal.filter(scores, tmp_path / "out.json", min_delta=0.0)
    shutil.copy(tmp_path / "blue.png", data.parent)
    assert seecal.filter(scores, tmp_path / "out.json", min_delta=-99.0).kept == 8


def test_a_browser_says_what_is_missing(tmp_path):
    data, scores = made(tmp_path, ANSWERS)
    (data.parent / "blue.png").unlink()
    seecal.report(scores, out=tmp_path / "page.html")
    with page_of(tmp_path / "page.html") as opened:
        cards = opened.page.locator(".record .images")
        assert cards.nth(2).inner_text() == "image missing: 'blue.png'"
        assert cards.nth(1).locator("img").count() == 1
        assert "2 of 8 records have an image that is missing" in opened.page.locator(".note").inner_text()
        assert opened.problems == []


def noisy(folder, count):
    """Records with one noisy image each: their thumbnails are several times as large as those of plain colours."""
    data = llava_file(folder / "data", [f"word{number}" for number in range(count)])
    rows = json.loads(data.read_text("utf8"))
    for number, row in enumerate(rows):
        row["image"] = f"noise{number}.png"
        Image.effect_noise((48, 40), 90).save(data.parent / row["image"])
    data.write_text(json.dumps(rows), "utf8")
    return scored_folder(data, folder / "scores")


@pytest.mark.parametrize("kind", ["plain colours", "noise"])
def test_the_note_names_the_budget_that_holds_all_and_the_rest_is_spread_evenly(tmp_path, kind):
    count = 300
    words = [f"word{number}" for number in range(count)]
    scores = noisy(tmp_path, count) if kind == "noise" else made(tmp_path, words)[1]
    none = seecal.report(scores, out=tmp_path / "page.html", budget_mb=0)
    size = float(none.notes[0].split("take ")[1].split(" kB")[0])
    assert (size > 1) == (kind == "noise")
    some = seecal.report(scores, out=tmp_path / "page.html", budget_mb=0.8 * size * count / 1000)
    assert 0.6 * count < some.images < 0.95 * count
    shown = sorted(map(int, json.loads(parsed(tmp_path / "page.html").scripts["thumbnails"])))
    halves = [sum(number < count / 2 for number in shown), sum(number >= count / 2 for number in shown)]
    assert max(halves) < 1.2 * min(halves)
    enough = float(some.notes[0].split("--budget-mb ")[1].rstrip("."))
    assert enough == pytest.approx(size * count / 1000, abs=0.11)
    assert seecal.report(scores, out=tmp_path / "page.html", budget_mb=enough).images == count
