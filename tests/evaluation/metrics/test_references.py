"""What a column of the data becomes as true answers."""

import pytest

from seecal.data.paths import RecordError
from seecal.evaluation.metrics.references import boxes, texts
from seecal.evaluation.metrics.table import METRICS, metric_named


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("red", ["red"]),
        (["red", 3], ["red", "3"]),
        (("red",), ["red"]),
        (5, ["5"]),
        (0.5, ["0.5"]),
        (7.0, ["7"]),
        ([-3.0, 1e16, 2.5], ["-3", "10000000000000000", "2.5"]),
        ("7.0", ["7.0"]),
        ("[7.0]", ["7"]),
        (float("inf"), ["inf"]),
        ('["a", "b"]', ["a", "b"]),
        ("[not json", ["[not json"]),
        ("", [""]),
    ],
)
def test_texts(value, found):
    assert texts(value) == found


@pytest.mark.parametrize("value", [None, True, [], {"a": 1}, [None], [["a"]]])
def test_no_texts(value):
    with pytest.raises(RecordError, match="answer"):
        texts(value)


def test_boxes():
    assert boxes([0, 0.5, 1, 1]) == [[0, 0.5, 1, 1]]
    assert boxes([[0, 0, 1, 1], [0, 0, 0.5, 1]]) == [[0, 0, 1, 1], [0, 0, 0.5, 1]]
    assert boxes("[0, 0.5, 1, 1]") == [[0, 0.5, 1, 1]]
    for wrong in ([0, 1, 1], "left", [0, 0, 1, float("nan")], [0, 0, 1, True], None, [[0, 0, 1, 1], 3], []):
        with pytest.raises(RecordError, match="not four numbers"):
            boxes(wrong)


def test_the_table_takes_every_metric():
    records = [{"dataset": "x"}, {"dataset": "HME100k"}]
    for name, metric in METRICS.items():
        answers = ["[0, 0, 1, 1]", "A"]
        true = [[[0, 0, 1, 1]]] * 2 if name == "iou" else [["A"] * 4] * 2
        scores = metric.scores(answers, true, records)
        assert len(scores) == 2
        assert all(isinstance(score, float) for score in scores)
        if metric.columns == ():
            assert metric.scores(answers, true) == scores
    with pytest.raises(ValueError, match=r"metric='bleu' is not known: expected one of exact, vqa"):
        metric_named("bleu")
