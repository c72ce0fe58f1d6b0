"""The experiment with real weights, on the tiny model: shared alignment, exact noise, no unseen drawing in training."""

import json
from collections import Counter

import numpy as np
import pytest

from experiments import real_weights
from seecal.demo import emoji, files
from tests.support.tiny import tiny_llava, tiny_llava_processor

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("seed", [0, 3])
def test_exactly_so_many_answers_are_anothers_of_the_same_kind_of_question(share, seed):
    asked = files.questions(emoji.catalogue(), 20, 16, seed)
    found = real_weights.noisy(asked, share, seed)
    changed = [(one, other) for one, other in zip(asked, found, strict=True) if one[1].text != other[1].text]
    assert len(changed) == round(share * len(asked))
    assert [item for item, _ in found] == [item for item, _ in asked], "the drawings keep their places"
    assert [answer.question for _, answer in found] == [answer.question for _, answer in asked]
    for question in emoji.QUESTIONS.values():
        texts, noisy = (Counter(a.text for _, a in some if a.question == question) for some in (asked, found))
        assert sum((noisy - texts).values()) <= 1, "answers are exchanged, at most the last is given twice"
    assert real_weights.noisy(asked, share, seed) == found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, rows of three arms) with the tiny model in the place of the one that ships; what was trained on, kept."""
    folder, seen = tmp_path_factory.mktemp("real"), []
    tiny_llava().save_pretrained(folder / "start")
    tiny_llava_processor().save_pretrained(folder / "start")
    with pytest.MonkeyPatch.context() as patch:
        known = emoji.catalogue()
        some = [item for split in (emoji.TRAIN, *files.HELD_OUT) for item in emoji.by_split(known, split)[:25]]
        patch.setattr(emoji, "catalogue", lambda: tuple(some))
        patch.setattr(real_weights, "bf16_pays", lambda: (False, "a test"))
        write = files.write_data
        patch.setattr(files, "write_data", lambda path, asked, images: seen.append(asked) or write(path, asked, images))
        arms = ({"weighting": "uniform"}, {}, {"alpha": 0.0, "beta": 0.01})
        found = [real_weights.run(1, 0.2, arm, folder, steps=2) for arm in arms]
    return folder, found, seen


def test_the_arms_share_alignment_and_data_and_differ_in_weights_alone(runs):
    folder, (plain, cal, wide), seen = runs
    assert plain["facts"] == cal["facts"]
    aligned, first, again, second, *_ = seen  # a finished alignment is asked for again, and not made again
    assert aligned == again
    assert first == second != aligned
    assert len(list(folder.glob("seed-1-steps-2/aligned/final"))) == 1
    assert not list(folder.glob("*-arm-*")), "half a gigabyte a run would stay"
    assert plain["shares"] == {}, "no weights are measured"
    assert wide["shares"]["at_alpha"] < cal["shares"]["at_alpha"], "its own alpha and beta"
    assert not np.allclose(cal["arrays"]["nll_visual"], plain["arrays"]["nll_visual"], atol=1e-6)
    assert not np.allclose(wide["arrays"]["nll_visual"], cal["arrays"]["nll_visual"], atol=1e-6)


def test_nothing_unseen_is_trained_on(runs):
    _, _, seen = runs
    assert {item.split for asked in seen for item, _ in asked} == {emoji.TRAIN}


def test_the_arrays_have_a_number_for_each_unseen_drawing(runs):
    _, found, _ = runs
    for one in found:
        for values in one["arrays"].values():
            assert values.shape == (25,)
            assert np.isfinite(values).all()
        assert set(one["arrays"]) == {"exact", "nll_visual", "nll_filler"}
        assert set(np.unique(one["arrays"]["exact"])) <= {0.0, 1.0}
        assert one["facts"]["unseen"] == 25
        assert 0 < one["facts"]["commonest"] < 1
    json.dumps([{name: value for name, value in one.items() if name != "arrays"} for one in found])
