"""Arrays in rows come back."""

import numpy as np
import pytest
from experiments.items import packed, unpacked


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 800])
def test_bits_come_back_exactly_and_numbers_to_a_thousandth(count):
    draw = np.random.default_rng(count)
    bits, values = draw.integers(0, 2, count), draw.normal(2, 3, count)
    found = packed({"bits": bits, "values": values})
    assert unpacked(found["bits"]).tolist() == bits.tolist()
    assert np.abs(unpacked(found["values"]) - values).max(initial=0) <= 5.01e-4
    assert len(found["bits"]) <= count / 4 + 8
    assert len(found["values"]) <= count * 8 / 3 + 12


def test_what_is_not_a_number_or_too_large():
    found = unpacked(packed({"a": [np.nan, 1e9, -1e9, 32.766]})["a"])
    assert np.isnan(found[0])
    assert found[1:].tolist() == pytest.approx([32.766, -32.766, 32.766])
    with pytest.raises(ValueError, match=r"a is \[2, 1\]"):
        packed({"a": [[1], [2]]})
