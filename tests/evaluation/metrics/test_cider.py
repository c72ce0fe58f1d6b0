"""CIDEr-D: the figures that pycocoevalcap 1.2 gives (recorded), and what must hold for any captions."""

import importlib.util

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seecal.evaluation.metrics.cider import cider, tokens

RECORDED = [
    (
        ["a cat sits on the mat", "a dog runs", "two red birds on a wire today"],
        [
            ["a cat sits on a mat", "the cat is on the mat"],
            ["a dog runs fast in the park", "a brown dog runs"],
            ["two birds on a wire"],
        ],
        [4.769958891543203, 3.1599113719818988, 5.164042194305674],
    ),
    (["a a a a a a", "a big red dog"], [["a cat"], ["a big red dog"]], [0.0, 10.0]),
    (["cat", "dog", ""], [["cat", "a cat"], ["cat"], ["dog"]], [1.6768323546727848, 0.0, 0.0]),
    (["a cat"], [["a cat"]], [0.0]),  # one image alone: nothing is telling
]


@pytest.mark.parametrize(("predictions", "references", "expected"), RECORDED)
def test_recorded_scores(predictions, references, expected):
    assert cider(predictions, references, str.split) == pytest.approx(expected, abs=1e-12)


WORDS = st.lists(st.sampled_from(["a", "cat", "dog", "sits", "on", "the", "mat", "red"]), max_size=8).map(" ".join)
IMAGES = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=2, max_size=6)


@given(IMAGES)
@settings(max_examples=60, deadline=None)
def test_any_captions(images):
    predictions, references = [one for one, _ in images], [many for _, many in images]
    scores = cider(predictions, references, str.split)
    assert all(-1e-9 <= score <= 10 + 1e-9 for score in scores)
    assert cider(predictions[::-1], references[::-1], str.split) == pytest.approx(scores[::-1])
    same = cider([many[0] for many in references], [many[:1] for many in references], str.split)
    assert all(score == pytest.approx(0, abs=1e-9) or score > 0 for score in same)


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="compared with the recorded scores above")
@given(IMAGES)
@settings(max_examples=60, deadline=None)
def test_against_pycocoevalcap(images):
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer()
    for one in images:
        scorer += one
    if not any(gram for of_image in scorer.crefs for grams in of_image for gram in grams):
        return  # it fails without any words
    _, expected = scorer.compute_score()
    assert cider(*zip(*images, strict=True), str.split) == pytest.approx(list(expected), abs=1e-9)


def test_other_images_change_a_score():
    alone = cider(["a cat", "a dog"], [["a cat sits"], ["a dog"]], str.split)[0]
    beside = cider(["a cat", "a dog", "x"], [["a cat sits"], ["a dog"], ["a dog sits"]], str.split)[0]
    assert alone != pytest.approx(beside)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("The T-shirt (red), 3.5 m; U.S. 1st!", "the t-shirt red 3.5 m u.s. 1st"),
        ("\"Can't stop\" - they're 2-for-1...", "ca n't stop they 're 2-for-1"),
        ("", ""),
    ],
)
def test_words(caption, words):
    assert tokens(caption) == words.split()
