"""Kinds of tokens, words, and what stands out."""

import numpy as np
import pytest

from seecal.data.collators.conversation import ConversationEncoder
from seecal.scoring.read import RecordScores
from seecal.scoring.spans import label_tokens
from seecal.scoring.summary import EDGES, KINDS, Summary, answers_of, kinds_of
from tests.scoring.test_spans import TOKENIZERS, conversation
from tests.support.tiny import PLAIN_TEMPLATE, tiny_llava_processor


def record(tokens, deltas, *, seen=None, turns=None, names=()):
    """Tokens of one answer (or of ``turns``); "" is the token that ends it, or what ``names`` calls, in order."""
    names = iter(names)
    turns = turns or [0] * len(tokens)
    starts, stops, at = [], [], {}
    for token, turn in zip(tokens, turns, strict=True):
        starts.append(at.get(turn, 0))
        at[turn] = starts[-1] + len(token)
        stops.append(at[turn])
    columns = {
        "turn": np.array(turns), "token": np.array([token or next(names, "<|end|>") for token in tokens], dtype=object),
        "start": np.array(starts), "stop": np.array(stops), "delta": np.array(deltas, dtype=np.float32),
        "has_contrast": np.array([True] * len(tokens) if seen is None else seen),
    }  # fmt: skip
    return RecordScores("data.json", 0, "r0", columns)


def test_kinds():
    tokens = ["The", " ast", "ronaut", " has", " 3", " (", "red", ")", " hats", ".", ""]
    found = [KINDS[kind] for kind in kinds_of(answers_of(record(tokens, [0.0] * len(tokens))))]
    assert found == [
        "function words", "other words", "other words", "function words", "numbers", "punctuation", "other words",
        "punctuation", "other words", "punctuation", "end of turn",
    ]  # fmt: skip


def test_an_emoji_in_bytes_and_several_turns():
    made = answers_of(record(["👩", "", "🚀", "a", ""], [0.0] * 5, turns=[0, 0, 0, 1, 1], names=["Ģ"]))
    assert made.texts == ["👩🚀", "a"]
    assert made.turns == [0, 1]
    assert [KINDS[kind] for kind in kinds_of(made)] == [
        "punctuation", "punctuation", "punctuation", "function words", "end of turn",
    ]  # fmt: skip


END = "end of turn"


@pytest.mark.parametrize(
    ("tokens", "names", "kinds"),
    [
        (["a", "🦊", "", "", ""], ["ĭ", "Ĭ", "<|end|>"], ["function words", *["punctuation"] * 3, END]),
        (["a", "🦊", "", "", ""], ["<0xA6>", "<0x8A>", "</s>"], ["function words", *["punctuation"] * 3, END]),
        (["red", "红", "", ""], ["º", "¢Ģ"], [*["other words"] * 4]),
        (["红", "", "!", ""], ["ºĢ", "<|end|>"], ["other words", "other words", "punctuation", END]),
        (["a", "", ""], ["Ċ", "<|end|>"], ["function words", "punctuation", END]),
        (["a", "", "", ""], ["▁", "</s>", "<0x0A>"], ["function words", "punctuation", END, "punctuation"]),
        (["a", "", ""], ["Ċ", "Ċ"], ["function words", "punctuation", END]),
        (["", "a", ""], ["<odd>", "<|end|>"], ["function words", "function words", END]),
        ([""], ["<|end|>"], [END]),
    ],
    ids=["emoji last", "emoji last, byte tokens", "cut off in bytes", "bytes inside", "a blank before the end",
         "blanks around the end", "blanks alone", "first", "nothing else"],
)  # fmt: skip
def test_only_the_last_token_of_a_turn_ends_it(tokens, names, kinds):
    found = answers_of(record(tokens, [0.0] * len(tokens), names=names))
    assert [KINDS[kind] for kind in kinds_of(found)] == kinds


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("answers", [["A 🦊"], ["红红", "é🚀"], ["🇩🇪 a 👩‍🚀"]], ids=["emoji", "chinese", "joined"])
def test_each_turn_has_one_end_whatever_the_tokenizer(tokenizer, answers):
    tokenizer = tokenizer()
    families_own = tiny_llava_processor(PLAIN_TEMPLATE)
    families_own.tokenizer = tokenizer
    tokens = label_tokens(ConversationEncoder(families_own).encode(conversation(answers), "r"))
    columns = {
        "turn": np.array([token.turn for token in tokens]), "start": np.array([token.start for token in tokens]),
        "stop": np.array([token.stop for token in tokens]),
        "token": [token.text or tokenizer.convert_ids_to_tokens(token.token_id) for token in tokens],
    }  # fmt: skip
    made = answers_of(RecordScores("data.json", 0, "r0", columns))
    assert made.texts == answers
    ends = [place for place, kind in enumerate(kinds_of(made)) if KINDS[kind] == END]
    assert [tokens[place].token_id for place in ends] == [tokenizer.eos_token_id] * len(answers)
    assert (made.inside == ((made.start == made.stop) & ~made.ends)).all()


def test_a_word_counts_the_bytes_of_its_last_character():
    summary = Summary(1.0, 5.0)
    one = record(["a", " 红", "", "", "."], [9.0, 1.0, 2.0, 6.0, 9.0], names=["º", "¢"])
    summary.add(0, one, answers_of(one))
    assert summary.words.extremes(1)[0] == [("a", 1, 9.0), ("红", 1, 3.0)]


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_counts_nowhere(strange):
    summary = Summary(1.0, 5.0)
    one = record(["red", " cat", ""], [strange, 6.0, 1.0])
    summary.add(0, one, answers_of(one))
    assert (summary.tokens, summary.seen, summary.against) == (3, 3, [])
    (row,) = summary.rows(summary.by_source)
    assert row == {"name": "data.json", "tokens": 2, "mean": 3.5, "against": 0, "at_alpha": 0.5, "at_beta": 0.5}
    assert summary.words.extremes(1)[0] == [("cat", 1, 6.0)]
    none = record(["red"], [strange])
    summary.add(1, none, answers_of(none))
    assert summary.by_source["data.json"].sum() == 2


def test_words_that_changed():
    before, after = Summary(1.0, 5.0), Summary(1.0, 5.0)
    for summary, deltas in ((before, [1.0, 5.0, 2.0, 9.0]), (after, [4.0, 1.0, 2.0, np.nan])):
        one = record(["red", " cat", " sky", " odd"], deltas)
        summary.add(0, one, answers_of(one))
    rose, fell = before.words.changes(after.words, 1)
    assert rose == [("red", 1, 1.0, 4.0)]
    assert fell == [("cat", 1, 5.0, 1.0)]
    assert before.words.changes(after.words, 2) == ([], [])


def test_words_are_means_of_their_tokens_and_come_often_enough():
    summary = Summary(1.0, 5.0)
    for number in range(3):
        one = record(["Ast", "ronaut", " and", " sky", ""], [4.0, 2.0, -1.5, 9.0, 0.0])
        summary.add(number, one, answers_of(one))
    one = record(["rare"], [50.0])
    summary.add(3, one, answers_of(one))
    high, low = summary.words.extremes(3)
    assert high == [("sky", 3, 9.0), ("astronaut", 3, 3.0), ("and", 3, -1.5)]
    assert low == high[::-1]
    assert [(number, token) for _, number, token in summary.against] == [(0, 2), (1, 2), (2, 2)]


def test_tokens_without_an_image_count_nowhere():
    summary = Summary(1.0, 5.0)
    one = record(["red", " cat", ""], [-9.0, 6.0, 1.0], seen=[False, True, True])
    summary.add(0, one, answers_of(one))
    assert (summary.tokens, summary.seen) == (3, 2)
    assert summary.against == []
    (row,) = summary.rows(summary.by_source)
    assert row == {"name": "data.json", "tokens": 2, "mean": 3.5, "against": 0, "at_alpha": 0.5, "at_beta": 0.5}
    assert summary.by_source["data.json"].sum() == 2
    none = record(["a"], [0.0], seen=[False])
    summary.add(1, none, answers_of(none))
    assert summary.seen == 2


def test_what_lies_beyond_the_picture_is_in_its_outermost_bins():
    summary = Summary(1.0, 5.0)
    one = record(["a", " b", " c"], [-99.0, 99.0, 15.0])
    summary.add(0, one, answers_of(one))
    counts = summary.by_source["data.json"]
    assert (counts[0], counts[-1], counts.sum()) == (1, 2, 3)
    assert len(counts) == len(EDGES) - 1


def test_only_the_most_contradictory_tokens_are_kept():
    summary = Summary(1.0, 5.0)
    for number in range(200):
        one = record(["x"], [-2.0 - number / 10])
        summary.add(number, one, answers_of(one))
    kept = summary.against
    assert [number for _, number, _ in kept] == list(range(199, 139, -1))
    assert kept[0][0] == pytest.approx(-21.9, abs=1e-4)
