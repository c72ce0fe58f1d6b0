"""A report page in a real browser, opened from a file."""

import json

import pytest

import seecal
from tests.pages.test_report import HOSTILE
from tests.support.chromium import chromium_path, page_of
from tests.support.scored import llava_file, scored_folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """name -> path of a page: one model, two models, hostile texts."""
    chromium_path()
    folder = tmp_path_factory.mktemp("pages")
    answers = [f"The cat number {number} is {'red' if number % 2 else 'blue'}." for number in range(90)]
    answers[7] = ["A first answer.", "And a second one?"]
    data = llava_file(folder / "data", answers, questions=[f"Question {number}?" for number in range(90)])
    scores = scored_folder(data, folder / "scores")
    other = scored_folder(data, folder / "other", seed=1, shift=3.0, model="b/model")
    hostile = llava_file(folder / "hostile", HOSTILE, ids=["<b>1</b>", "2", "3", "4", "5"])
    made = {"one": (scores, None), "two": (scores, other), "hostile": (scored_folder(hostile, folder / "h"), None)}
    for name, (first, second) in made.items():
        seecal.report(first, second, out=folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


def ids(page):
    return page.locator(".record .head b").all_inner_texts()


def test_search_sort_filter_pages_and_the_address_that_keeps_them(pages):
    with page_of(pages["one"]) as opened:
        page = opened.page
        assert page.locator("#count").inner_text() == "90 of 90 records"
        assert ids(page) == [f"r{number}" for number in range(20)]
        page.locator("#next").click()
        assert ids(page)[0] == "r20"
        page.locator("#search").fill("NUMBER 17 ")
        assert ids(page) == ["r17"]
        page.locator("#search").fill("Question 8")
        assert ids(page) == ["r8", *(f"r{number}" for number in range(80, 90))]
        page.locator("#sort").select_option("mean-down")
        means = page.evaluate("found.map((number) => index.mean[number])")
        assert means == sorted(means, reverse=True)
        assert len(set(means)) > 5
        page.reload()
        assert page.locator("#search").input_value() == "Question 8"
        assert page.locator("#sort").input_value() == "mean-down"
        page.locator("#search").fill("")
        page.locator("#from").fill("2")
        assert 0 < len(page.evaluate("found")) < 90
        assert min(page.evaluate("found.map((number) => index.mean[number])")) >= 2
        page.locator("#from").fill("")
        page.locator("#only").select_option("text")
        assert ids(page) == []
        page.locator("#only").select_option("against")
        assert max(page.evaluate("found.map((number) => index.least[number])")) < -1
        assert opened.problems == []


@pytest.mark.parametrize("how", ["hover", "focus"])
def test_numbers_of_a_token(pages, how):
    with page_of(pages["one"]) as opened:
        page = opened.page
        token = page.locator(".record .t").first
        assert page.locator("#tip").is_hidden()
        token.hover() if how == "hover" else token.focus()
        told = page.locator("#tip").inner_text()
        delta, weight = page.evaluate(
            "(() => { const side = tokensOf(0)[0].sides[0]; return [side.delta, side.weight]; })()"
        )
        sign = "+" if delta > 0 else "−"
        assert told.startswith(f"“The”\nΔ {sign}{abs(delta) / 100:.2f} logits\nlogit +9.00 with")
        assert told.endswith(f"weight {weight / 100:.2f}")
        assert token.get_attribute("aria-label") == told.replace("\n", ", ")
        page.keyboard.press("Escape")
        page.mouse.move(0, 0)
        assert page.locator("#tip").is_hidden()
        assert opened.problems == []


def test_words_are_means_of_their_tokens(pages):
    with page_of(pages["one"]) as opened:
        page = opened.page
        page.locator("#unit").select_option("word")
        texts = page.locator(".record").first.locator(".t").all_inner_texts()
        assert texts == ["The", " cat", " number", " 0", " is", " blue", ".", "<|end|>"], "blanks are no words"
        text, tokens = page.evaluate(
            "[index.answers[7].join('|'), asWords(tokensOf(7), 7).map((word) => word.text).join('')]"
        )
        assert text.replace("|", "") == tokens
        made = page.evaluate(
            "meanOf([{sides: [{delta: 100, weight: 100, logit: 0}]}, {sides: [{delta: 400, weight: 500, logit: 10}]}])"
        )
        assert made == [{"delta": 250, "weight": 300, "logit": 5}]
        assert opened.problems == []


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["a", " ", "cat", "  ", "\n", "sat", "."], ["a", " cat", "  \nsat", "."]),
        ([" ", "a", " "], [" a "]),
        (["\u3000", " "], ["\u3000 "]),
        ([], []),
    ],
    ids=["between", "at both ends", "nothing else", "empty"],
)
def test_blanks_belong_to_the_word_that_follows(pages, pieces, words):
    with page_of(pages["one"]) as opened:
        assert opened.page.evaluate("withBlanks", pieces) == words


def test_a_word_is_the_mean_of_the_tokens_of_its_letters(pages):
    """Not of one that only carries the blank before it, and also of those that go on with its last character."""
    with page_of(pages["one"]) as opened:
        token = {"turn": 0, "inside": False}
        tokens = [
            {**token, "start": 0, "stop": 4, "sides": [{"delta": 100, "weight": 100, "logit": 0}]},
            {**token, "start": 4, "stop": 7, "sides": [{"delta": 300, "weight": 300, "logit": 0}]},
            {**token, "start": 7, "stop": 9, "sides": [{"delta": 500, "weight": 300, "logit": 0}]},
            {
                **token,
                "start": 9,
                "stop": 9,
                "inside": True,
                "name": "Ģ",
                "sides": [{"delta": 700, "weight": 300, "logit": 0}],
            },
            {**token, "start": 9, "stop": 9, "name": "<|end|>", "sides": [{"delta": 900, "weight": 300, "logit": 0}]},
        ]
        words = opened.page.evaluate(
            "(tokens) => { index.answers[0] = ['The cat🦊']; return asWords(tokens, 0); }", tokens
        )
        assert [(word.get("text") or word["name"], word["sides"][0]["delta"]) for word in words] == [
            ("The", 100), (" cat", 300), ("🦊", 600), ("<|end|>", 900),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "shown", "kept"),
    [
        ("#sort=gain", 90, ""),
        ("#sort=logprob&search=number+17+", 1, "#search=number+17+"),
        ("#source=elsewhere.json&only=nothing&unit=letter", 90, ""),
        ("#from=abc&to=1e999&id=r7&page=3", 90, ""),
        ("#%E0%A4%A&=&&sort", 90, ""),
        ("#records", 90, ""),
        ("#search=r9999", 0, "#search=r9999"),
    ],
    ids=[
        "a sort of another page",
        "an unknown sort",
        "unknown choices",
        "no numbers",
        "malformed",
        "a place",
        "no such id",
    ],
)
def test_an_address_that_asks_for_what_the_page_lacks(pages, address, shown, kept):
    with page_of(pages["one"], address=address) as opened:
        page = opened.page
        assert page.locator("#count").inner_text() == f"{shown} of 90 records"
        assert page.locator("#sort").input_value() == "place"
        assert page.locator("#unit").input_value() == "token"
        assert page.locator(".record").count() == min(shown, 20)
        assert page.evaluate("location.hash") == kept
        assert opened.problems == []


def test_the_same_address_where_the_page_has_it(pages):
    with page_of(pages["two"], address="#sort=gain&unit=word") as opened:
        assert opened.page.locator("#sort").input_value() == "gain"
        assert opened.page.locator("#unit").input_value() == "word"
        assert opened.page.evaluate("location.hash") == "#sort=gain&unit=word"


def test_the_keyboard_does_all_of_it(pages):
    with page_of(pages["one"]) as opened:
        page = opened.page
        page.keyboard.press("j")
        page.keyboard.press("j")
        assert page.locator(".record.chosen .head b").inner_text() == "r1"
        page.keyboard.press("k")
        assert page.locator(".record.chosen .head b").inner_text() == "r0"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent").strip() == "cat"
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("document.activeElement.textContent").strip() == "The"
        page.keyboard.press("n")
        assert page.locator("#page").inner_text() == "page 2 of 5"
        page.keyboard.press("p")
        page.keyboard.press("w")
        assert page.locator("#unit").input_value() == "word"
        page.keyboard.press("/")
        page.keyboard.type("just")
        assert page.locator("#search").input_value() == "just", "letters are text there"
        assert page.locator("#count").inner_text() == "0 of 90 records"
        assert opened.problems == []


def test_two_models_side_by_side(pages):
    with page_of(pages["two"]) as opened:
        page = opened.page
        first = page.locator(".record").first
        assert first.locator(".answer .side").all_inner_texts() == ["A", "B"]
        assert "A mean Δ" in first.inner_text()
        page.locator("#sort").select_option("gain")
        gains = page.evaluate("found.map((number) => index.mean2[number] - index.mean[number])")
        assert gains == sorted(gains, reverse=True)
        page.locator("#sort").select_option("loss")
        assert page.evaluate("found.map((number) => index.mean2[number] - index.mean[number])") == sorted(gains)
        assert opened.problems == []


def test_text_of_the_data_is_shown_and_does_nothing(pages):
    with page_of(pages["hostile"]) as opened:
        page = opened.page
        assert page.evaluate("window.hacked") is None
        assert page.locator(".record").count() == 5
        shown = [page.locator(".record").nth(number).locator(".answer").inner_text() for number in range(5)]
        assert "</script><script>window.hacked = 1</script> red" in shown[0]
        assert "<img src=x onerror=window.hacked=1> green" in shown[1]
        assert '=HYPERLINK("http://example.com") blue' in shown[2]
        assert "⟨U+202E⟩reversed⟨U+202C⟩" in shown[3]
        assert "{{ 7 * 7 }} {% raw %} é 👩‍🚀 你好 red" in shown[4]
        assert ids(page)[0] == "<b>1</b>"
        assert page.locator(".record img").count() == 5, "only our thumbnails"
        assert opened.problems == []


def luminance(page):
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(json.loads(colour.replace("rgb(", "[").replace(")", "]")))


def test_a_phone_and_dark_paper(pages):
    for name in ("one", "two"):
        with page_of(pages[name], width=400, height=800, color_scheme="dark") as opened:
            page = opened.page
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
            assert luminance(page) < 150
            assert page.locator(".picture.dark").first.is_visible()
            assert not page.locator(".picture.light").first.is_visible()
            page.locator("#theme").click()
            assert luminance(page) > 600
            assert opened.problems == []


def test_what_is_seen_can_be_read(pages):
    with page_of(pages["one"]) as opened:
        page = opened.page
        assert all(page.locator(".record img").evaluate_all("images => images.map((image) => image.alt)"))
        assert all(
            page.locator("figure .picture").evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")
        )
        assert page.locator("figure table").count() == page.locator("figure").count()
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input, select, button')]"
            ".filter((one) => !(one.labels?.length || one.textContent.trim())).length"
        )
        assert unnamed == 0
        word = page.locator("[data-word]").first
        word.click()
        assert page.locator("#search").input_value() == word.get_attribute("data-word")
        assert opened.problems == []
