"""Scores of labelled tokens on a tiny model, and what they come to."""

import json

import numpy as np
import pytest
from experiments.planted import FILLER, OBJECT, Case
from experiments.token_kinds import LOGS, SCORES, WEIGHTED, Tokens, endpoints, labelled, measured, scores_of

import seecal
from seecal import CALOptions
from seecal.scoring import RecordScores, read_scores
from tests.support.tiny import tiny_image, tiny_llava, tiny_llava_processor

PIECES = (("The picture shows ", FILLER), ("red fish", OBJECT), (". It is ", FILLER), ("a ", ""), ("plant", "kind"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava().save_pretrained(folder)
    tiny_llava_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Two drawings, each with one text that fits it and, of the other one, one that does not."""
    folder, found = tmp_path_factory.mktemp("images"), []
    for drawing, colour in enumerate(("red", "blue")):
        tiny_image(colour).save(folder / f"{colour}.png")
        for fits, name in ((True, colour), (False, ("blue", "red")[drawing])):
            pieces = (("It is ", FILLER), (f"{name} {name}", OBJECT), (".", FILLER))
            found.append(Case(drawing, folder / f"{colour}.png", fits, "What is it?", pieces))
    return found


def record_of(text, tokens):
    """A record whose tokens are these pieces of its text; "" is the one that ends the turn."""
    stops = np.cumsum([len(token) for token in tokens])
    assert "".join(tokens) == text
    starts = stops - [len(token) for token in tokens]
    return RecordScores("s", 0, "r", {"start": starts, "stop": stops})


def test_a_token_is_of_the_piece_that_its_first_letter_is_in():
    case = Case(0, None, True, "", PIECES)
    tokens = ["The", " picture", " shows", " re", "d", " fish", ". It", " is", " a", " plant", ""]
    found = [(tokens[place], label) for place, label, _ in labelled(case, record_of(case.text, tokens))]
    assert found == [
        ("The", FILLER),
        (" picture", FILLER),
        (" shows", FILLER),
        (" re", OBJECT),
        ("d", OBJECT),
        (" fish", OBJECT),
        (". It", FILLER),
        (" is", FILLER),
        (" plant", "kind"),
    ]


def test_where_a_token_starts_is_where_it_stands_in_the_text():
    case = Case(0, None, True, "", (("so ", ""), ("red red", OBJECT)))
    found = list(labelled(case, record_of(case.text, ["so", " red", " red"])))
    assert found == [(1, OBJECT, 2), (2, OBJECT, 6)]


def test_the_same_token_of_the_same_text_is_one_word(model, known):
    found, digest = measured(model, known, "drop", bf16=False)
    assert len(digest) == 32
    right, wrong = found[OBJECT, True], found[OBJECT, False]
    assert sorted(right.words) == sorted(wrong.words)
    assert len(set(right.words)) == len(right.words), "the two mentions of a text are two words"
    assert set(right.words).isdisjoint(found[FILLER, True].words)
    beside = [dict(zip(one.words, one.drawings, strict=True)) for one in (right, wrong)]
    assert all({beside[0][word], beside[1][word]} == {0, 1} for word in right.words)
    # Without the image the same text has the same log-probability, so this control cannot know anything
    low, high = wrong.of("logprob_without"), right.of("logprob_without")
    assert high.values[np.argsort(high.words)] == pytest.approx(low.values[np.argsort(low.words)], abs=1e-5)
    assert right.scores["gain"] == pytest.approx(
        [one - other for one, other in zip(right.scores["logprob_with"], right.scores["logprob_without"], strict=True)]
    )
    rows = endpoints(found)
    assert {(row.get("planted"), row["of"]) for row in rows} == {
        (planted, score) for planted in (OBJECT, FILLER, None) for score in SCORES
    }
    for row in rows:
        assert ("matched" in row) == (row["endpoint"] == "right against wrong")
        assert row["plain"]["low"] <= row["plain"]["estimate"] <= row["plain"]["high"]


@pytest.mark.parametrize("weighting", WEIGHTED)
def test_weights_are_those_that_score_writes(model, known, tmp_path, weighting):
    rows = [
        {
            "id": str(number),
            "image": str(case.image),
            "conversations": [
                {"from": "human", "value": f"<image>\n{case.question}"},
                {"from": "gpt", "value": case.text},
            ],
        }
        for number, case in enumerate(known)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows), "utf8")
    options = CALOptions(weighting=weighting)
    seecal.score(
        str(model), str(tmp_path / "data.json"), tmp_path / "out", options=options, logprobs=True, image_root="/"
    )
    for record in read_scores(tmp_path / "out"):
        found = scores_of(record)
        assert set(found) == set(SCORES)
        assert found[f"weight of {weighting}"] == pytest.approx(record.columns["weight"], abs=1e-6)


def of_values(right, wrong, words):
    """Tokens that fit and tokens that do not, one a word, with these scores."""
    found = {}
    for label in (OBJECT, FILLER):
        for fits, values in ((True, right), (False, wrong)):
            tokens = found.setdefault((label, fits), Tokens())
            for number, (value, word) in enumerate(zip(values, words, strict=True)):
                tokens.add(dict.fromkeys(SCORES, float(value)), word, number + len(words) * fits)
    return found


def test_what_words_hide_and_what_words_pretend():
    """Inside each word 0.1 higher where it fits: all pairs hide it."""
    words = range(40)
    rows = endpoints(of_values(np.arange(40) + 0.1, np.arange(40), words))
    (row,) = [row for row in rows if row.get("planted") == OBJECT and row["of"] == "delta"]
    assert row["matched"] == {"estimate": 1.0, "low": 1.0, "high": 1.0}
    assert row["plain"]["estimate"] == pytest.approx(0.5125, abs=1e-4)
    assert (row["tokens"], row["words"]) == ([40, 40], 40)
    assert set(LOGS) < set(SCORES)
