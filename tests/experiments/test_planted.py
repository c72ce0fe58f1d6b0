"""Every text stands as often beside a drawing that it fits as beside one that it does not fit."""

import random
from collections import Counter

import numpy as np
import pytest
from experiments.planted import (
    AFTER_NAME,
    COLOURS,
    FILLER,
    NUMBERS,
    OBJECT,
    PLANTED,
    VISUAL,
    cases,
    clear_hue,
    exchanges,
    paste,
)
from PIL import Image

from seecal.demo import emoji


@pytest.mark.parametrize("labels", ["aabbcc", "abcdefgh", "aaabbbc", "aaaabbb", "ab", "aabbccddee"])
@pytest.mark.parametrize("seed", range(5))
def test_every_word_is_given_as_often_as_it_is_given_away(labels, seed):
    plans = exchanges(labels, random.Random(seed), times=2)
    for plan in plans:
        assert set(plan) == set(plan.values())
        assert all(labels[place] != labels[other] for place, other in plan.items())
        most = Counter(labels).most_common(1)[0][1]
        assert len(plan) == len(labels) - max(2 * most - len(labels), 0)
    pairs = [pair for plan in plans for pair in plan.items()]
    assert len(pairs) == len(set(pairs))
    assert plans


def test_of_a_label_that_most_have_as_many_take_part_as_there_are_others():
    (plan,) = exchanges("aaaaaaab", random.Random(0), times=3)
    assert sorted("aaaaaaab"[place] for place in plan) == ["a", "b"]
    left_out = {place for seed in range(40) for place in exchanges("aaab", random.Random(seed))[0]}
    assert left_out == {0, 1, 2, 3}, "it has to be a lot that says which ones"
    assert exchanges("aaaa", random.Random(0)) == exchanges("", random.Random(0)) == []


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """The cases of a demo whose drawings are plain colours."""
    demo, pasted = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("pasted")
    (demo / "images").mkdir()
    for number, item in enumerate(emoji.catalogue()):
        colour = ("red", "blue", "gray")[number % 3]
        Image.new("RGB", (8, 8), colour).save(demo / "images" / f"{emoji.slug(item.name)}.png")
    return cases(demo, pasted, 30)


def places(known, planted, fits):
    """Of the texts with such a piece: text -> the drawings that it stands beside."""
    found = {}
    for case in known:
        if case.fits == fits and planted in [label for _, label in case.pieces]:
            found.setdefault((case.question, case.text), []).append(case.drawing)
    return found


@pytest.mark.parametrize("planted", PLANTED)
def test_words_say_nothing_about_right_and_wrong(known, planted):
    right, wrong = places(known, planted, True), places(known, planted, False)
    times = 2 if planted in (OBJECT, AFTER_NAME, FILLER) else 1
    assert right
    assert {text: times * len(drawings) for text, drawings in right.items()} == {
        text: len(drawings) for text, drawings in wrong.items()
    }
    for text, drawings in right.items():
        assert not set(drawings) & set(wrong[text]), "a text cannot be both beside one drawing"


def test_texts_are_true_where_they_say_so(known):
    own = {
        case.drawing: {label: text for text, label in case.pieces}
        for case in known
        if case.fits and OBJECT in [label for _, label in case.pieces]
    }
    for case in known:
        labels = {label: text for text, label in case.pieces}
        drawing = own[case.drawing]
        if OBJECT in labels:
            assert case.fits == (labels[OBJECT] == drawing[OBJECT])
            assert case.fits == (labels[AFTER_NAME] == drawing[AFTER_NAME])
        if "kind" in labels:
            assert case.fits == (labels["kind"] == drawing[AFTER_NAME])
        if "negation" in labels:
            assert "not" in case.text
            assert case.fits == (labels["negation"] != drawing[AFTER_NAME])
        if "colour" in labels:
            assert case.fits == (labels["colour"] == clear_hue(case.image))
        if "count" in labels:
            dark = (np.asarray(Image.open(case.image).convert("RGB"))[::112, ::112] < 255).any(-1).sum()
            assert case.fits == (NUMBERS.index(labels["count"]) + 1 == dark)


def test_pieces_are_the_demos_own_words(known):
    items = {item.name: item for item in emoji.catalogue()}
    for case in known:
        labels = {label: text for text, label in case.pieces}
        if OBJECT in labels:
            item = items[labels[OBJECT]]
            answer = emoji.answer(item, "describe", random.Random(1))
            assert case.text == answer.text
            assert set(labels) <= {"", FILLER, *VISUAL}
            seen = "".join(text for text, label in case.pieces if label != FILLER)
            assert seen == "".join(text for text, visual in answer.pieces if visual)


def test_hues_and_pasted_drawings(tmp_path):
    for name, hue in COLOURS.items():
        Image.fromarray(np.full((8, 8, 3), [int(255 * hue), 255, 255], np.uint8), "HSV").convert("RGB").save(
            tmp_path / "one.png"
        )
        assert clear_hue(tmp_path / "one.png") == name
    for colour in ("white", "gray", "black"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "one.png")
        assert clear_hue(tmp_path / "one.png") is None
    halves = Image.new("RGB", (8, 8), "red")
    halves.paste("blue", (0, 0, 4, 8))
    halves.save(tmp_path / "one.png")
    assert clear_hue(tmp_path / "one.png") is None
    Image.new("RGB", (8, 8), "black").save(tmp_path / "one.png")
    for count in range(1, 5):
        pixels = np.asarray(Image.open(paste(tmp_path / "one.png", count, tmp_path / "out.png")))
        assert (pixels == 0).all(-1).mean() == count / 4
