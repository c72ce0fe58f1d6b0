"""A mixture keeps its weights, says where each record came from, and refuses what cannot be mixed."""

import itertools
import math
from collections import Counter

import pytest
import torch

from seecal.data.collators.vision import VisionCollator
from seecal.data.sources import mixture
from seecal.data.sources.load import load_records
from seecal.data.sources.mixture import drawn, mix
from tests.support.sources import RICH, llava_jsonl, load, messages
from tests.support.tiny import tiny_llava_processor

DRAWS = 10_000
WEIGHTS = {"captions": 0.6, "questions": 0.3, "text": 0.1}


def rows(name, count):
    return [{"id": f"{name}{index}", "messages": messages([("a", "b")])} for index in range(count)]


def binomial_interval(trials, probability, outside=0.001):
    """[low, high] that a binomial count leaves with a probability of at most ``outside``, half of it on either side."""
    log_p, log_q = math.log(probability), math.log1p(-probability)
    mass = [
        math.exp(
            math.lgamma(trials + 1) - math.lgamma(count + 1) - math.lgamma(trials - count + 1)
            + count * log_p + (trials - count) * log_q
        )
        for count in range(trials + 1)
    ]  # fmt: skip
    below = list(itertools.accumulate(mass))
    above = list(itertools.accumulate(reversed(mass)))
    low = next(count for count, total in enumerate(below) if total > outside / 2)
    high = trials - next(count for count, total in enumerate(above) if total > outside / 2)
    return low, high


def test_the_interval_is_the_exact_one():
    assert binomial_interval(10, 0.5, 0.05) == (2, 8)  # P(≤1) = 11/1024 < 0.025 < P(≤2) = 56/1024
    low, high = binomial_interval(DRAWS, 0.3)
    assert 2840 < low < 2860
    assert 3140 < high < 3160


@pytest.fixture(scope="module")
def three():
    sizes = {"captions": 6000, "questions": 3000, "text": 1100}
    return {name: load_records(rows(name, size)) for name, size in sizes.items()}


@pytest.mark.parametrize("streaming", [False, True], ids=["file", "streaming"])
def test_a_mixture_keeps_its_weights(three, streaming):
    parts = {name: one.to_iterable_dataset() if streaming else one for name, one in three.items()}
    mixture = mix(parts, WEIGHTS, seed=1)
    if streaming:
        drawn = [record["source"] for record in mixture.take(DRAWS)]
    else:
        assert len(mixture) >= DRAWS
        drawn = mixture[:DRAWS]["source"]
    counts = Counter(drawn)
    assert sum(counts.values()) == DRAWS
    for name, weight in WEIGHTS.items():
        low, high = binomial_interval(DRAWS, weight)
        assert low <= counts[name] <= high, (name, counts)
    # Not only in all: any thousand of them, and whatever came before each
    for start in range(0, DRAWS, 1000):
        some = Counter(drawn[start : start + 1000])
        for name, weight in WEIGHTS.items():
            low, high = binomial_interval(1000, weight, 1e-5)
            assert low <= some[name] <= high
    after = Counter(second for first, second in itertools.pairwise(drawn) if first == "text")
    low, high = binomial_interval(after.total(), WEIGHTS["captions"])
    assert low <= after["captions"] <= high


def test_streaming_or_not_the_mixture_is_complete(three):
    mixture = mix(three, WEIGHTS, seed=2)
    assert {record["id"] for record in mixture.select_columns(["id"])} == {
        one["id"] for data in three.values() for one in data.select_columns(["id"])
    }, "all_exhausted: every record at least once"
    ids = [one for one, source in zip(mixture["id"], mixture["source"], strict=True) if source == "questions"]
    order = list(three["questions"]["id"])
    assert ids[:3000] == order[: len(ids[:3000])], "a set keeps its order"


def test_the_seed_and_only_the_seed_chooses(three):
    def draws(seed, weights=(6, 3, 1)):
        return mix(three, weights, seed=seed, stopping="first_exhausted")["source"][:300]

    assert draws(0) == draws(0, WEIGHTS) == draws(0, [60, 30, 10])
    assert draws(0) != draws(1)


def test_weights_go_by_name_in_whatever_order_they_are_written(three):
    def draws(weights):
        return mix(three, weights, seed=3, stopping="first_exhausted")["source"][:300]

    backwards = dict(reversed(WEIGHTS.items()))
    assert list(backwards) != list(three)
    assert draws(backwards) == draws(WEIGHTS)


def test_when_to_stop():
    parts = {"a": load_records(rows("a", 20)), "b": load_records(rows("b", 40))}
    first = Counter(mix(parts, [1, 1], stopping="first_exhausted")["source"])
    assert first["a"] == 20
    assert first["b"] < 40
    once = mix(parts, [1, 1], stopping="all_exhausted_without_replacement")
    assert Counter(once["source"]) == {"a": 20, "b": 40}
    assert len(set(once["id"])) == 60
    every = Counter(mix(parts, [1, 1])["source"])
    assert every["b"] == 40
    assert every["a"] > 20
    by_size = mix(parts, seed=3, stopping="first_exhausted")
    low, high = binomial_interval(len(by_size), 1 / 3)
    assert low <= Counter(by_size["source"])["a"] <= high


def test_one_set_alone_and_what_the_collator_sees(tmp_path):
    collator = VisionCollator(tiny_llava_processor())
    data = load(llava_jsonl, tmp_path, RICH)
    mixture = mix({"only": data})
    assert set(mixture["source"]) == {"only"}
    records = [record for record in mixture if record["source"] == "only"]
    batch, expected = collator(records), collator(list(data))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_what_cannot_be_mixed(three):
    a, stream = three["text"], three["text"].to_iterable_dataset()
    for arguments, message in (
        (({},), "one set at least"),
        (([a, a],), "a dict of name"),
        (({"a": a, "b": stream}, [1, 1]), "'b' streams and the others do not"),
        (({"a": stream, "b": stream},), "a set that streams has none"),
        (({"a": a, "b": a}, [1]), r"1 weights for 2 sets \('a', 'b'\)"),
        (({"a": a, "b": a}, {"a": 1, "c": 2}), "weights for 'a', 'c', but the sets are 'a', 'b'"),
        (({"a": a, "b": a}, [1, 0]), "weight 0 of set 'b'"),
        (({"a": a, "b": a}, [1, float("nan")]), "weight nan of set 'b'"),
        (({"a": a, "b": a}, [1, "2"]), "weight '2' of set 'b'"),
        (({"a": a, "b": a.remove_columns("id")},), "set 'b': columns messages, images; records are needed"),
        (({"a": "path.json"},), "set 'a': str; records are needed"),
    ):
        with pytest.raises(ValueError, match=message):
            mix(*arguments)
    with pytest.raises(ValueError, match="stopping='never': expected one of all_exhausted"):
        mix({"a": a}, stopping="never")


@pytest.mark.parametrize(
    ("lengths", "weights", "seed"), [([40, 200], [3, 1], 0), ([64, 12], [1, 9], 42), ([5, 700, 1300], [1, 2, 9], 7)]
)
def test_what_a_mixture_draws_is_known_from_its_lengths(lengths, weights, seed):
    sets = {f"s{place}": load_records(rows(f"s{place}-", length)) for place, length in enumerate(lengths)}
    counts = Counter(mix(sets, weights, seed=seed)["source"])
    assert drawn(lengths, weights, seed=seed) == [counts[name] for name in sets]


def test_very_many_draws_are_not_made_to_count_them(monkeypatch):
    lengths, weights = [50_000, 80_000], [1, 4]
    counted = drawn(lengths, weights, seed=0)
    monkeypatch.setattr(mixture, "_MOST_DRAWS", 1000)
    assert drawn(lengths, weights, seed=0) == pytest.approx(counted, rel=0.02)
    assert drawn([600_000, 600_000], [1, 1_000_000], seed=0) == [600_000, 600_000_000_000]
