"""Boxes in answers: how they are read, and how much of the true one they cover."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seecal.evaluation.metrics.iou import box_of, iou, iou_details


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2,0.3, 1]", [0.1, 0.2, 0.3, 1]),
        ("It is at [ 0.1, 0.2, 0.3, 0.4 ], or [1, 1, 1, 1].", [0.1, 0.2, 0.3, 0.4]),
        ("[-0.5, 0, 10, 200]", [-0.5, 0, 10, 200]),
        ("[.5, 0, 1, 1]", [0, 0, 0, 0]),
        ("(0.1, 0.2, 0.3, 0.4)", [0, 0, 0, 0]),
        ("0.1, 0.2, 0.3, 0.4", [0, 0, 0, 0]),
        ("[1e-1, 0.2, 0.3, 0.4]", [0, 0, 0, 0]),
        ("[0.1, 0.2, 0.3]", [0, 0, 0, 0]),
        ("[0.1 , 0.2, 0.3, 0.4]", [0, 0, 0, 0]),
        ("", [0, 0, 0, 0]),
    ],
)
def test_boxes_in_texts(text, box):
    assert box_of(text) == box


@pytest.mark.parametrize(
    ("box", "true", "overlap"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1], 1),
        ([0, 0, 0.5, 1], [0, 0, 1, 1], 0.5),
        ([0, 0, 2, 1], [0, 0, 1, 1], 0.5),  # nothing is clipped
        ([0.5, 0.5, 1, 1], [0, 0, 1, 1], 0.25),
        ([1, 1, 0, 0], [0, 0, 1, 1], 0),  # corners exchanged
        ([0.6, 0, 1, 1], [0, 0, 0.5, 1], 0),
        ([0, 0, 0, 0], [0, 0, 0, 0], 0),  # the field divides by zero here
        ([0, 0, 0, 0], [0, 0, 1, 1], 0),
        ([10, 20, 100, 200], [0.1, 0.1, 0.5, 0.5], 0),  # pixels are no shares
    ],
)
def test_overlaps(box, true, overlap):
    assert iou(f"{list(map(float, box))}", [true]) == pytest.approx(overlap)


def test_thresholds_include_their_edge_and_the_middle_its_border():
    found = iou_details("[0, 0, 0.5, 1]", [[0, 0, 1, 1]])
    assert found == {"acc@0.1": 1, "acc@0.3": 1, "acc@0.5": 1, "acc@0.7": 0, "acc@0.9": 0, "center": 1}
    assert iou_details("[0, 0, 2, 2]", [[0, 0, 1, 1]])["center"] == 1
    assert iou_details("[0, 0, 2, 2]", [[0, 0, 0.9, 1]])["center"] == 0


def test_the_best_of_several():
    assert iou("[0, 0, 1, 1]", [[0, 0, 0.1, 0.1], [0, 0, 1, 1]]) == 1


NUMBER = st.floats(min_value=-2, max_value=2, allow_subnormal=False).map(lambda number: round(number, 3))


@given(st.lists(NUMBER, min_size=4, max_size=4), st.lists(NUMBER, min_size=4, max_size=4))
def test_any_boxes(first, second):
    true = [min(second[0], second[2]), min(second[1], second[3]), max(second[0], second[2]), max(second[1], second[3])]
    overlap = iou(f"{first}", [true])
    assert 0 <= overlap <= 1
    if true[0] < true[2] and true[1] < true[3]:
        assert iou(f"{true}", [true]) == pytest.approx(1)
