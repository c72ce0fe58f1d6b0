"""A report page of scores with numbers that are not finite: one record spoils nothing but itself."""

import json
import math
import re

import pytest

import seecal
from tests.pages.test_report import parsed
from tests.support.chromium import page_of
from tests.support.scored import llava_file, scored_folder

ANSWERS = ["a red cat", "a blue dog", "a green bird", "one yellow fish"]
STRANGE = {"NaN": math.nan, "infinite": math.inf, "minus infinite": -math.inf}


def strict(text):
    """JSON as a browser reads it: NaN and Infinity are errors."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def scores_with(folder, column, value, places, *, name="scores", data=None, **options):
    """Scores with Δ 2 everywhere, and ``value`` at (record, token) of ``places``."""

    def change(row, token, values):
        if (row, token) in places:
            values[column] = value

    data = data or llava_file(folder / "data", ANSWERS)
    made = scored_folder(data, folder / name, delta_of=lambda row, count: [2.0] * count, change=change, **options)
    return data, made


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
@pytest.mark.parametrize("column", ["delta", "logit_with", "weight"])
def test_every_part_of_the_page_is_json_and_the_note_counts(tmp_path, column, value):
    _, scores = scores_with(tmp_path, column, value, {(1, 0), (1, 2)})
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert report.not_finite == 2
    assert report.notes == [
        "2 tokens of 1 record with a Δ, logit or weight that is not finite, the first in record 'r1'. Left out of charts, "
        "means, lists and sorting."
    ]
    page = parsed(tmp_path / "page.html")
    parts = {name: strict(text) for name, text in page.scripts.items()}
    assert parts["index"]["mean"] == [2.0] * 4
    assert parts["index"]["least"] == [2.0] * 4
    assert parts["settings"]["notFinite"] == {"1": 2}
    assert parts["settings"]["against"] == [[]], "minus infinity is not the most contradictory token"
    place = {"delta": 4, "weight": 5, "logit_with": 6}[column]
    shown = {"nan": "nan", "inf": "inf", "-inf": "-inf"}[str(value)]
    assert [one for one in parts["chunk-0"][1][place] if isinstance(one, str)] == [shown] * 2
    text = (tmp_path / "page.html").read_text("utf8")
    assert "NaN" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)
    (mean,) = set(re.findall(r"<td>([+−][\d.]+)</td>", text))
    assert mean == "+2.00"


@pytest.mark.parametrize("places", [{(2, token) for token in range(4)}, {(r, t) for r in range(4) for t in range(4)}])
def test_a_record_without_any_finite_number_and_a_set_of_them(tmp_path, places):
    _, scores = scores_with(tmp_path, "delta", math.nan, places)
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.records, report.images, report.not_finite) == (4, 4, len(places))
    index = strict(parsed(tmp_path / "page.html").scripts["index"])
    assert index["mean"] == [None if (record, 0) in places else 2.0 for record in range(4)]
    assert (tmp_path / "page.html").read_text("utf8").count("<svg") == (4 if len(places) == 4 else 0)


def test_finite_numbers_leave_no_trace(tmp_path):
    _, scores = scores_with(tmp_path, "delta", 1e30, {(1, 0)})
    report = seecal.report(scores, out=tmp_path / "page.html")
    assert (report.not_finite, report.notes) == (0, [])
    assert 'value="odd"' not in (tmp_path / "page.html").read_text("utf8")


def test_a_browser_shows_them(tmp_path):
    places = {(1, 1), *((2, token) for token in range(4))}
    data, scores = scores_with(tmp_path, "delta", math.nan, places)
    _, other = scores_with(tmp_path, "delta", math.inf, {(3, 0)}, name="other", data=data, seed=1, model="b/model")
    seecal.report(scores, other, out=tmp_path / "page.html")
    with page_of(tmp_path / "page.html") as opened:
        page = opened.page
        assert page.locator(".record").count() == 4
        marked = page.locator(".record").nth(1).locator(".t.not-finite")
        assert marked.all_inner_texts() == [" blue"]
        marked.focus()
        assert page.locator("#tip").inner_text() == (
            "“blue”\nΔ not finite (NaN) logits\nlogit +9.00 with, not finite without\nweight 2.00"
        )
        assert "1 token with numbers that are not finite" in page.locator(".record").nth(1).inner_text()
        assert page.locator(".record").nth(2).locator(".images img").count() == 1
        for order in ("mean-down", "mean-up", "least", "against", "gain", "loss"):
            page.locator("#sort").select_option(order)
            assert page.locator(".record").count() == 4
            assert page.evaluate("found.at(-1)") == 2, "a record without a number is last in every order"
        page.locator("#sort").select_option("place")
        page.locator("#only").select_option("odd")
        assert page.evaluate("found") == [1, 2, 3]
        page.locator("#only").select_option("image")
        assert page.evaluate("found") == [0, 1, 2, 3]
        page.locator("#unit").select_option("word")
        sides = [{"delta": "nan", "weight": 100, "logit": 10}, {"delta": 400, "weight": 500, "logit": 10}]
        found = page.evaluate("(all) => meanOf(all.map((one) => ({ sides: [one] })))", sides)
        assert found == [{"delta": 400, "weight": 500, "logit": 10, "count": 1}]
        assert opened.problems == []
