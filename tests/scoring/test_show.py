"""What a notebook shows: words in colour, and nothing of the data read as HTML."""

import base64
import html.parser
import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image

import seecal
from seecal import VisionCollator
from seecal.core.coloured import ColouredToken, coloured, visible
from tests.support.tiny import tiny_dataset, tiny_image

NASTY = "<script>alert('x')</script> <b>&amp; \u202edlrow \x07"


class Page(html.parser.HTMLParser):
    """Tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, text):
        self.text += text


@pytest.fixture
def delta(model, processor):
    return seecal.visual_delta(model, dict(VisionCollator(processor)(list(tiny_dataset(5)))))


def test_tokens_as_a_table(delta, processor):
    table = delta.tokens(processor.tokenizer)
    assert list(table.columns)[:5] == ["sample", "position", "token_id", "token", "has_contrast"]
    assert table["delta"].tolist() == delta.delta.tolist()
    assert "".join(table["token"][table["sample"] == 0]).startswith("It is ")
    assert "logprob_with" not in table.columns
    assert delta.tokens(processor).equals(table), "a processor will do"


def test_tokens_without_pandas(delta, processor, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = delta.tokens(processor.tokenizer)
    assert len(rows) == len(delta)
    assert rows[0] == {
        "sample": 0,
        "position": int(delta.position[0]),
        "token_id": int(delta.labels[0]),
        "token": "It",
        "has_contrast": True,
        "delta": float(delta.delta[0]),
        "logit_with": float(delta.logit_with[0]),
        "logit_without": float(delta.logit_without[0]),
    }


def test_a_notebook_shows_ids_until_it_knows_words(delta, processor):
    page = Page(delta._repr_html_())
    assert f"{int(delta.labels[0])} " in page.text
    assert "call .tokens(tokenizer) once to see words" in page.text
    delta.tokens(processor)
    page = Page(delta._repr_html_())
    assert "sample 0: It is " in page.text
    assert ".tokens" not in page.text
    titles = [value for name, value in page.attributes if name == "title"]
    assert titles[0] == f"Δ {float(delta.delta[0]):+.2f}"
    assert "no image before it" in titles, "sample 4 has none"


def test_colours():
    shown = coloured([ColouredToken("a", 5.0, True), ColouredToken("b", -5.0, True), ColouredToken("c", 0.0, False)])
    styles = [value for name, value in Page(shown).attributes if name == "style"]
    assert "rgba(94,60,153,0.45)" in styles[0]
    assert "rgba(230,97,1,0.45)" in styles[1]
    assert "underline" in styles[1], "not by colour alone"
    assert "underline" not in styles[0]
    assert "background" not in styles[2]


def test_text_of_the_data_is_text():
    page = Page(coloured([ColouredToken(NASTY, 1.0, True)]))
    assert page.tags == ["bdi"]
    assert page.text == "<script>alert('x')</script> <b>&amp; ⟨U+202E⟩dlrow ⟨U+0007⟩"
    assert visible('"') == "&quot;"


def test_show(model, processor):
    model.train()
    record = {
        "id": "a",
        "messages": [
            {"role": "user", "content": "What colour is it?"},
            {"role": "assistant", "content": f"It is red. {NASTY}"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ],
        "images": [tiny_image("red")],
    }
    shown = seecal.show(model, processor, record)
    assert model.training
    assert "".join(token.text for token in shown.tokens if token.turn == 0) == f"It is red. {NASTY}"
    assert len(shown.tokens) == len(shown.delta)
    page = Page(shown._repr_html_())
    assert set(page.tags) == {"div", "img", "p", "bdi", "small"}
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    assert "It is red. <script>" in page.text
    assert str(shown).splitlines()[0].split()[0] == f"{float(shown.delta.delta[0]):+.2f}"
    batch = dict(VisionCollator(processor)([record]))
    torch.testing.assert_close(shown.delta.delta, seecal.visual_delta(model.eval(), batch).delta)


def test_show_a_record_as_it_was_loaded(model, processor):
    record = seecal.load_records(tiny_dataset(5))[4]
    shown = seecal.show(model, processor, record)
    assert "–" in str(shown)
    assert "<img" not in shown._repr_html_()


RED = np.full((40, 60, 3), (255, 0, 0), np.uint8)


@pytest.mark.parametrize(
    ("array", "colour"),
    [
        (RED, (255, 0, 0)),
        (torch.from_numpy(RED).movedim(-1, 0), (255, 0, 0)),
        (np.full((40, 60), 128, np.uint8), (128, 128, 128)),
        (np.full((40, 60, 1), 128, np.uint8), (128, 128, 128)),
    ],
    ids=["array", "tensor, channels first", "grey", "grey, one channel"],
)
def test_show_an_array(model, processor, array, colour):
    """What the collator takes for an image."""
    messages = [{"role": "user", "content": "What colour is it?"}, {"role": "assistant", "content": "It is red."}]
    shown = seecal.show(model, processor, {"messages": messages, "images": [array]})
    (source,) = [value for name, value in Page(shown._repr_html_()).attributes if name == "src"]
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
    assert picture.size == (60, 40)
    assert picture.getpixel((30, 20)) == colour


@pytest.mark.parametrize("sign", ["\x1b", "\x9b", "\x85", "\u061c", "\u200f", "\u2028", "\u202e", "\u2067"])
def test_what_terminals_and_browsers_obey_is_written_out(sign):
    assert visible(f"a{sign}b\tc\n") == f"a⟨U+{ord(sign):04X}⟩b\tc\n"
