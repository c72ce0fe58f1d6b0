"""What seecal preview writes: a terminal with colours and without, the page in a real browser, texts that stay texts."""

import dataclasses
import io
import json
import re
import sys

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import seecal
from seecal.cli import main as cli
from seecal.cli.main import app
from seecal.pages.preview import page_of
from seecal.pages.preview_text import half_blocks, rendered, show
from seecal.recipes.tiny import tiny_folder
from seecal.scoring.previewed import LEFT_OUT, STOPS, Check, Piece
from tests.support.chromium import page_of as opened_page
from tests.support.recipe_files import recipe_file
from tests.support.tiny import tiny_image

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7*7 }}[red]x[/red]</mark>'
REVERSED = "a\u202eb\x1b[31m\x9b1m\u2066\x07⟦c⟧\u061c"
COLOURS = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "120"}
QUIET = Console(quiet=True)
SGR = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory):
    """A recipe about an image, two of them, none, hostile texts, and a record whose image is missing."""
    folder = tmp_path_factory.mktemp("data")
    for colour in ("red", "blue"):
        tiny_image(colour, (48, 32)).save(folder / f"{colour}.png")

    def row(name, question, answer, *images):
        chat = [{"from": "human", "value": "<image>" * len(images) + question}, {"from": "gpt", "value": answer}]
        return {"id": name, "conversations": chat, **({"image": list(images)} if images else {})}

    rows = [
        row("one", "What colour is it?", "It is red.\nIt is.", "red.png"),
        row("two", "What is it?", "It is red.", "red.png", "blue.png"),
        row("text", "What is it?", "It is it."),
        row(f"n{HOSTILE}", HOSTILE, HOSTILE, "red.png"),
        row(f"r{REVERSED}", REVERSED, REVERSED, "red.png"),
        row("lost", "What is it?", "It is.", f"none{HOSTILE}.png"),
    ]
    (folder / "data.json").write_text(json.dumps(rows), "utf8")
    return recipe_file(folder / "recipe.yaml", tiny, folder / "out", data=str(folder / "data.json"), on_bad="skip")


def asked(file, *options, env=None):
    done = CliRunner(env=env or {}).invoke(
        app, ["preview", file, "-n", "9", *map(str, options)], catch_exceptions=False
    )
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}])
def test_without_colours_there_are_only_characters(env, file):
    text = asked(file, env=env)
    assert "\x1b" not in text
    assert "▀" not in text
    assert "[image 1: 16 tokens]What colour is it?<|end|>↵\n<|start|>assistant↵\n⟦It is red.↵\nIt is.<|end|>⟧↵" in text
    assert "image 1: 48 × 32 pixels; image 2: 48 × 32 pixels" in text
    assert "no image" in text
    assert "6 records looked at, all there are: 1 failed a check" in text
    assert "1 × an image is missing: left out" in text
    assert "record 'lost'" in text
    assert "Δ (weight)" not in text


def test_with_colours(file):
    text = asked(file, env=COLOURS)
    plain = SGR.sub("", text)
    assert "\x1b" not in plain, "colours, and no other escape"
    assert "⟦It" not in plain
    assert "It is red.↵\nIt is.<|end|>" in plain
    red = "38;2;220;30;30;48;2;220;30;30m▀"
    assert red in text
    assert "38;2;40;60;220;48;2;40;60;220m▀" in text, "the second image too"
    assert "1;37;48;2;0;88;110m red" in text, "a label"
    assert "\x1b[2mWhat\x1b[0m" in text, "masked"


def test_texts_of_the_data_are_texts_in_a_terminal(file):
    for env in ({}, COLOURS):
        text = SGR.sub("", asked(file, env=env))
        assert not set("\x1b\x9b\x07\u202e\u2066\u061c") & set(text)
        assert HOSTILE in text.replace("\n", "")
        for code in ("202E", "001B", "009B", "2066", "0007", "27E6", "27E7", "061C"):
            assert f"⟨U+{code}⟩" in text


def test_delta_by_colour_and_in_numbers(file, tiny):
    text = asked(file, "--model", tiny / "model")
    record = seecal.preview(file, records=1, model=tiny / "model", console=QUIET).records[0]
    mine = [piece for piece in record.pieces if piece.label]
    assert f"Δ (weight): It {mine[0].delta:+.2f} ({mine[0].weight:.2f}), is {mine[1].delta:+.2f}" in text
    assert "It – (1.00)" in text, "the record without an image"
    pieces = [Piece("x", label=True, delta=delta) for delta in (5.0, 9.0, -5.0, -0.5, 0.0, None)]
    styles = [str(span.style) for span in rendered(pieces, True).spans]
    assert styles[0] == styles[1] != styles[2]
    assert ["underline" in style for style in styles] == [False, False, True, False, False, False]
    assert "rgb(52,52,58)" in styles[4]
    assert rendered(pieces, False).plain == "⟦xxxxxx⟧"


def test_what_is_cut_stands_apart():
    pieces = [Piece("a"), Piece("b", label=True), Piece("c", cut=True), Piece("d", cut=True)]
    assert rendered(pieces, False).plain == "a⟦b⟧ ✂ cd"
    assert rendered([*pieces[:2], Piece("e", label=True, token_id=1)], False).plain == "a⟦be⟧"
    assert "strike" in str(rendered(pieces, True).spans[2].style)


@pytest.mark.parametrize(("size", "lines", "width"), [((280, 240), 12, 28), ((1000, 1), 1, 28), ((1, 1000), 12, 1)])
def test_a_picture_keeps_its_form(size, lines, width):
    blocks = half_blocks(Image.new("RGB", size, "red")).plain.split("\n")
    assert (len(blocks), {len(line) for line in blocks}) == (lines, {width})


def test_a_function_prints_and_shows(file):
    preview = seecal.preview(file, console=QUIET)
    assert "⟦It is red.↵" in str(preview)
    assert "\x1b" not in str(preview)
    assert preview._repr_html_().startswith("<iframe sandbox srcdoc=")
    assert "<script" not in preview._repr_html_()


@pytest.fixture(scope="module")
def page(file, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "new" / "page.html"
    text = asked(file, "--html", path, "--model", tiny / "model")
    assert text.endswith("page.html: the same as a page\n")
    return path


def test_the_page_in_a_browser(page):
    with opened_page(page) as opened:
        shown = opened.page
        dialogs = []
        shown.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        shown.reload()
        assert opened.problems == []
        assert dialogs == []
        assert shown.locator(".preview").count() == 5
        assert shown.locator(".preview").nth(0).locator("mark").inner_text() == "It is red.↵\nIt is.<|end|>"
        assert shown.locator(".preview").nth(1).locator("img").count() == 2
        widths = shown.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
        assert widths == [48] * 5
        assert shown.locator(".preview").nth(2).get_by_text("no image", exact=True).count() == 1
        token = shown.locator("mark .t").first
        assert re.fullmatch(r"id \d+, Δ [+-]\d\.\d\d, weight \d\.\d\d", token.get_attribute("title"))
        assert "no image before it" in shown.locator(".preview").nth(2).locator(".t").first.get_attribute("title")
        colours = shown.locator("mark .t").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
        assert len(set(colours)) > 3
        shown.locator("summary").first.click()
        assert shown.locator("table").first.inner_text().startswith("token")
        assert shown.locator("#checks tbody tr").count() == 1
        assert "left out" in shown.locator("#checks").inner_text()


def test_texts_of_the_data_are_texts_on_the_page(page):
    source = page.read_text("utf8")
    assert "<script" not in source
    assert "<img src=x" not in source
    assert not set("\u202e\x1b\x9b\u2066\x07\u061c") & set(source)
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", source)
    with opened_page(page) as opened:
        hostile = opened.page.locator(".preview").nth(3)
        assert hostile.locator("h3").inner_text() == f"n{HOSTILE}"
        assert hostile.locator("mark").inner_text() == f"{HOSTILE}<|end|>"
        assert HOSTILE in hostile.locator(".text").inner_text().split("<|end|>")[0]
        turned = opened.page.locator(".preview").nth(4)
        words = "a⟨U+202E⟩b⟨U+001B⟩[31m⟨U+009B⟩1m⟨U+2066⟩⟨U+0007⟩⟦c⟧⟨U+061C⟩<|end|>"
        assert turned.locator("mark").inner_text() == words
        assert turned.locator("tbody th").all_text_contents().count("·") > 3, "later bytes, in the table only"
        assert f"none{HOSTILE}.png"[:30] in opened.page.locator("#checks").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(page, scheme):
    with opened_page(page, width=400, color_scheme=scheme) as opened:
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 400
        ink, paper = opened.page.evaluate("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (light[0] < light[1]) == (scheme == "light")


def test_checks_notes_and_cuts_on_the_page(file):
    preview = seecal.preview(file, records=0, console=QUIET)
    preview.checks = [Check("long", STOPS, 3, f"row 1{REVERSED}"), Check("missing", LEFT_OUT, 1, "row 2")]
    preview.notes = [f"keys{HOSTILE}"]
    source = page_of(preview)
    assert "No record that training can use" in source
    assert "training stops there" in source
    assert "<script" not in source
    record = seecal.preview(file, records=1, console=QUIET).records[0]
    cut = dataclasses.replace(record, pieces=[Piece("a"), Piece("b", cut=True), Piece("", 3, images=(1,), cut=True)])
    preview.records = [cut]
    assert '<bdi>a</bdi><del title="after max_length: cut"><bdi>b</bdi><span class="image">image 1' in page_of(preview)
    out = io.StringIO()
    show(preview, Console(file=out, width=40))
    assert "3 × is longer than max_length: training stops there" in out.getvalue()
    assert f"note: keys{HOSTILE}" in out.getvalue(), "not wrapped, not read as markup"
    for text in (source, out.getvalue()):
        assert "row 1a⟨U+202E⟩b⟨U+001B⟩[31m" in text
        assert not set("\x1b\x9b\x07\u202e\u2066") & set(text)


def test_what_the_command_takes_and_refuses(file, monkeypatch, capsys):
    assert "max_length: 77" in asked(file, "--max_length", 77)
    assert "the first 2 records looked at" in CliRunner().invoke(app, ["preview", file, "-n1", "--check", "2"]).stdout

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["seecal", "preview", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
        return line

    assert "no such file" in refused("nowhere.yaml")
    assert "Did you mean max_length" in refused(file, "--max_lenght", 5)
    assert "no such folder" in refused(file, "--model", "./nowhere")
    assert "none.json" in refused(file, "--data", "none.json")
    assert "this recipe has 1" in refused(file, "--stage", 2)
    assert "See seecal preview --help" in refused()
