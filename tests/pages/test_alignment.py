"""The page of seecal.alignment in a real browser, and what stands in it without one."""

import html
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import seecal
from seecal.cli.main import app
from seecal.pages.alignment import page_of as html_of
from seecal.recipes.tiny import tiny_folder
from seecal.scoring.alignment import AlignedImage, AlignedModel, AlignedRecord
from seecal.scoring.spans import LabelToken
from tests.support.chromium import page_of

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7*7 }}</script>'
REVERSED = "a\u202eb\x1b[31m"


def aligned(name="one", tokens=("It", " is", " red"), rows=2, columns=3, at=4, text="", peak=0.5, images=1):
    """Each token looks at the cell ``at`` + its number most; the n-th cell's word is ``word<n>``."""
    cells = rows * columns
    attention = np.full((len(tokens), cells), 0.01, np.float32)
    for number in range(len(tokens)):
        attention[number, (at + number) % cells] = peak - 0.1 * number
    words = [[(f"word{cell}{text}", 0.5), (f"second{cell}", 0.25)] for cell in range(cells)]
    shown = AlignedImage(
        Image.new("RGB", (60, 40), "white"), rows, columns, attention.reshape(-1, rows, columns), words, 0
    )
    record = AlignedRecord(
        f"data.json{text}",
        0,
        f"r0{text}",
        [f"What?{text}"],
        [LabelToken(0, number, 0, 0, f"{token}{text}") for number, token in enumerate(tokens)],
        np.array([-2.0, 0.5, 6.0][: len(tokens)], np.float32),
        np.array([True, False, True][: len(tokens)]),
        [shown] * images,
    )
    return AlignedModel(f"{name}{text}", "llava", 2, 4, 100, [record])


@pytest.fixture
def drawn(tmp_path):
    def draw(*models):
        path = tmp_path / "page.html"
        path.write_text(html_of(models), "utf8")
        return path

    return draw


def shades(page, side=0):
    return page.eval_on_selector_all(
        f".side[data-side='{side}'] .patch", "all => all.map(one => one.style.getPropertyValue('--shade'))"
    )


YELLOW = "rgb(254,232,56)"  # the scale's upper end


def test_a_token_is_chosen_by_click_hover_and_keyboard(drawn):
    with page_of(drawn(aligned())) as opened:
        page = opened.page
        tokens = page.locator(".token")
        assert tokens.all_inner_texts() == ["mean", "It", "·is", "·red"]
        tokens.nth(1).click()
        assert shades(page).index(YELLOW) == 4
        assert page.locator(".patch").nth(4).inner_text() == "50 %"
        assert page.locator(".legend").inner_text().split("\n") == ["0 %", "50 %"]
        assert (
            "55 % of the attention goes to the image, most to row 2, column 2 (50 %)"
            in page.locator(".sum").inner_text()
        )
        tokens.nth(2).hover()
        assert shades(page).index(YELLOW) == 5
        page.mouse.move(1, 1)
        assert shades(page).index(YELLOW) == 4, "back to what was chosen"
        tokens.nth(1).focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert shades(page).index(YELLOW) == 0
        assert tokens.nth(3).get_attribute("aria-pressed") == "true"
        assert "Δ +6.00" in tokens.nth(3).get_attribute("aria-label")
        assert "no image before it" in tokens.nth(2).get_attribute("aria-label")
        assert opened.problems == []


def test_words_and_the_plain_image(drawn):
    with page_of(drawn(aligned())) as opened:
        page = opened.page
        page.keyboard.press("w")
        assert page.locator(".patch").all_inner_texts() == [f"word{cell}" for cell in range(6)]
        page.locator(".patch").nth(2).hover()
        said = page.locator(".cell").inner_text()
        assert "Row 1, column 3" in said
        assert "word2 0.50, second2 0.25" in said
        page.locator(".patch").nth(2).focus()
        page.keyboard.press("ArrowDown")
        assert "Row 2, column 3" in page.locator(".cell").inner_text()
        page.keyboard.press("ArrowDown")
        assert "Row 2, column 3" in page.locator(".cell").inner_text(), "at the edge it stays"
        page.get_by_label("nothing").check()
        assert set(page.locator(".patch").all_inner_texts()) == {""}
        assert set(shades(page)) == {"transparent"}
        assert opened.problems == []


def test_two_models_side_by_side(drawn):
    with page_of(drawn(aligned("one"), aligned("two", at=1, peak=0.25))) as opened:
        page = opened.page
        page.locator(".side[data-side='0'] .token").nth(1).click()
        assert shades(page, 0).index(YELLOW) == 4
        assert shades(page, 1).index(YELLOW) == 1, "the other model's side follows"
        page.get_by_label("the record's highest").check()
        assert shades(page, 0).index(YELLOW) == 4
        assert YELLOW not in shades(page, 1), "on one scale the weaker is paler"
        boxes = [page.locator(".side").nth(number).bounding_box() for number in (0, 1)]
        assert boxes[0]["y"] == boxes[1]["y"]
        page.locator(".side[data-side='0'] .patch").nth(3).hover()
        assert page.locator(".side[data-side='1'] .patch").nth(3).evaluate("one => one.classList.contains('same')")
        assert opened.problems == []


def test_models_whose_tokens_differ_are_chosen_apart(drawn):
    with page_of(drawn(aligned("one"), aligned("two", tokens=("It is", " red"), rows=4, columns=4))) as opened:
        page = opened.page
        page.locator(".side[data-side='0'] .token").nth(3).click()
        assert page.locator(".side[data-side='1'] .token[aria-pressed=true]").inner_text() == "mean"
        assert opened.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(drawn, scheme):
    with page_of(drawn(aligned("one"), aligned("two", rows=16, columns=16)), width=400, color_scheme=scheme) as opened:
        page = opened.page
        for view in "awn":
            page.keyboard.press(view)
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
        boxes = [page.locator(".side").nth(number).bounding_box() for number in (0, 1)]
        assert boxes[1]["y"] > boxes[0]["y"]
        ink, paper = page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (light[0] < light[1]) == (scheme == "light")
        assert opened.problems == []


def test_texts_of_the_data_are_texts(drawn):
    path = drawn(aligned(text=HOSTILE), aligned("two", text=REVERSED))
    source = path.read_text("utf8")
    assert "<script>alert" not in source
    assert "<img src=x" not in source
    assert not set("\u202e\x1b") & set(source)
    with page_of(path) as opened:
        page = opened.page
        dialogs = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.reload()
        assert page.locator(".token").nth(1).inner_text() == f"It{HOSTILE}"
        page.keyboard.press("w")
        assert page.locator(".patch").nth(0).inner_text() == f"word0{HOSTILE}"
        page.locator(".patch").nth(0).hover()
        assert HOSTILE in page.locator(".cell").first.inner_text()
        assert page.locator("h2 bdi").first.inner_text() == f"r0{HOSTILE}"
        assert "⟨U+202E⟩" in page.locator(".side[data-side='1'] h3").inner_text()
        assert page.locator("img[src=x]").count() == 0
        assert dialogs == []
        assert opened.problems == []


def test_it_reads_without_scripts(drawn):
    source = drawn(aligned()).read_text("utf8")
    texts = html.unescape(re.sub(r"<[^>]+>", "|", source.split("<script")[0]))
    assert "row 2, column 2: 50.00 %" in texts
    assert re.search(r"word5\|+ ?0\.50", texts)
    assert not re.search(r"""(src|href)=["'](?!data:)""", source)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny")


def test_the_function_and_the_command(tiny, tmp_path):
    ids = [row["id"] for row in json.loads((tiny / "data.json").read_text("utf8")) if "image" in row][:2]
    report = seecal.alignment(str(tiny / "model"), tiny / "data.json", ids[0], out=tmp_path / "one.html", layer=-1)
    assert report.models[0].layer == 1
    assert "1 record with" in report.sentence()
    assert [record.record for record in report.models[0].records] == ids[:1]
    options = ["--model", str(tiny / "model"), "--other", str(tiny / "model"), "--data", str(tiny / "data.json")]
    done = CliRunner().invoke(
        app, ["report", "--alignment", *options, "--ids", ",".join(ids), "--out", str(tmp_path / "out" / "two.html")]
    )
    assert done.exit_code == 0, done.output
    assert "two.html: 2 records with" in done.output
    numbers = json.loads(
        re.search(r'id="numbers">(.*?)</script>', (tmp_path / "out" / "two.html").read_text("utf8"))[1]
    )
    first, second = numbers[0]["sides"]
    assert first == second, "the same model beside itself"
    measured = report.models[0].records[0].images[0].attention.reshape(-1, 16)
    again = json.loads(re.search(r'id="numbers">(.*?)</script>', (tmp_path / "one.html").read_text("utf8"))[1])
    np.testing.assert_allclose(again[0]["sides"][0]["images"][0]["attention"], measured, rtol=1e-3)


def test_what_the_function_refuses(tiny, tmp_path):
    out = tmp_path / "page.html"
    with pytest.raises(ValueError, match=r"max_tokens=0: expected 1 or more"):
        seecal.alignment(str(tiny / "model"), tiny / "data.json", "r0", max_tokens=0, out=out)
    with pytest.raises(ValueError, match="no record has the id 'nobody'"):
        seecal.alignment("no/model/here", tiny / "data.json", "nobody", out=out)
    for missing, options in (("--model", {}), ("--data", {"--model": "m"}), ("--ids", {"--model": "m", "--data": "d"})):
        arguments = [word for pair in options.items() for word in pair]
        done = CliRunner().invoke(app, ["report", "--alignment", *arguments])
        assert f"--alignment needs {missing}" in str(done.exception)
    assert not out.exists()


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["delta", "attention"])
def test_numbers_that_are_not_finite_are_refused_by_name(strange, where):
    model = aligned(name="b/model")
    (record,) = model.records
    if where == "delta":
        record.delta[2] = strange
    else:
        record.images[0].attention[0, 0, 0] = strange
    with pytest.raises(ValueError, match=r"b/model: record 'r0' has attention or a Δ that is not finite"):
        html_of([aligned(), model])
    record.delta[:] = strange  # a Δ that nothing shows: no token has an image before it
    record.has_contrast[:] = False
    record.images[0].attention[:] = 0.1
    assert "r0" in html_of([aligned(), model])
