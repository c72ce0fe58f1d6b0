"""Two gloo ranks give the loss and the gradients of one process on the same global batch."""

import json

import pytest

from tests.support.processes import two_ranks

HALVES = ("mixed", "one rank is text-only", "one rank has no label", "both ranks are text-only")
EVERY_HALF = [(halves, "llava", "drop", "global") for halves in HALVES]
CASES = {
    "ddp": [
        *EVERY_HALF,
        ("one rank is text-only", "llava_onevision", "drop", "global"),
        ("one rank has no label", "llava", "drop", "sample"),
        ("one rank is text-only", "llava", "drop", "global", "dft"),
        ("one rank is text-only", "llava", "drop", "tokens", "dft"),
        ("one rank has no label", "llava", "drop", "tokens", "prior"),
        ("mixed", "llava", "drop", "global", "cal", True),
        ("one rank has no label", "llava", "drop", "tokens", "cal", True),
    ],
    "fsdp2": [
        *EVERY_HALF,
        ("one rank is text-only", "llava_next", "drop", "global"),
        ("one rank is text-only", "llava", "mask", "global"),
        ("one rank has no label", "llava", "drop", "tokens"),
        *(("one rank is text-only", "llava", "drop", "global", weighting) for weighting in ("dft", "vig", "prior")),
    ],
    "fsdp2 with its head apart": EVERY_HALF,
}


@pytest.mark.parametrize("wrapper", CASES)
def test_two_ranks_are_one_process(wrapper, tmp_path):
    out = tmp_path / "results.json"
    two_ranks("-m", "tests.support.ranks_worker", out, json.dumps([(wrapper, *case) for case in CASES[wrapper]]))
    results = json.loads(out.read_text())
    assert len(results) == len(CASES[wrapper])
    for case, result in zip(CASES[wrapper], results, strict=True):
        expected = result["expected_loss"]
        assert abs(result["loss"] - expected) <= 1e-5 * max(1.0, abs(expected)), case
        assert result["gradient"] <= 1e-5 * max(1.0, result["scale"]), case
        assert result["scale"] > 1e-3, case
        assert result["heads"] == ["DTensor" if "apart" in wrapper else "Parameter"], case
