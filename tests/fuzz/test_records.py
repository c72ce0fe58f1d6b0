"""Malformed records by hypothesis: each is accepted or refused by name; what is accepted is learnt from or put aside.

Nothing else may come out: no other error, no line break in a reason, no record lost, no loss that is no number. Every file
becomes a step of a model with CAL; all of one kind in one file become an epoch of CALTrainer. ``pytest -m slow tests/fuzz``
tries ten thousand records; for longer: ``SEECAL_FUZZ_MINUTES=10 pytest -m slow tests/fuzz`` (figures: docs/reliability.md).
"""

import json
import logging
import math
import os
import time
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from seecal import CALTrainer, VisionCollator, enable_cal
from seecal.constants import LENGTH_COUNTS, QUARANTINED
from seecal.data.collators.quarantine import QuarantineCollator
from seecal.data.sources.formats import FORMATS
from seecal.data.sources.load import LoadReport, load_records
from seecal.data.sources.quarantine_file import read_quarantine
from tests.support.sgd import sgd_config
from tests.support.sources import messages, turn
from tests.support.tiny import tiny_llava, tiny_llava_processor

GOOD = {
    "llava": {"id": "a", "image": "red.png", "conversations": turn()},
    "sharegpt": {"id": "a", "images": ["red.png", "red.png"], "conversations": turn("<image><image>c")},
    "messages": {"id": "a", "images": ["red.png"], "messages": messages([("<image>a", "b"), ("c", "d")])},
    "prompt_completion": {"id": "a", "image": "red.png", "prompt": "a", "completion": "b"},
    "captions": {"id": "a", "file_name": "red.png", "text": "a", "prompt": "b"},
}
TELLING = ("red.png", "half.png", "gone.png", "../a.png", "http://a/b.png", "<image>", "<|end|>", "\ud800", "user")
TEXTS = st.one_of(st.text(max_size=40), st.sampled_from(TELLING))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
KEYS = (
    "id",
    "image",
    "images",
    "messages",
    "conversations",
    "role",
    "content",
    "type",
    "text",
    "weights",
    "from",
    "value",
)


@st.composite
def mutated(draw, format):
    """A record of the format in which something is replaced, removed, added or moved."""
    value = json.loads(json.dumps(GOOD[format]))
    for _ in range(draw(st.integers(1, 3))):
        at = value
        while True:
            places = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(at[place], (dict, list)) and draw(st.booleans()):
                at = at[place]
                continue
            what = draw(st.integers(0, 5))
            if what == 0:
                del at[place]
            elif what == 1 and isinstance(at, dict):
                at[draw(st.sampled_from(KEYS))] = at.pop(place)
            elif what == 2 and isinstance(at, dict):
                at[draw(st.sampled_from(KEYS))] = draw(VALUES)
            elif what == 3:
                at[place] = draw(VALUES)
            else:
                at[place] = draw(st.sampled_from(TELLING))
            break
    return value


def lines_of(format):
    """Lines of a file: mostly records of its format, or nearly so; also any JSON, lines that end early, and bytes."""
    record = mutated(format).map(lambda value: json.dumps(value).encode())
    return st.one_of(
        record,
        record,
        mutated("messages").map(lambda value: json.dumps(value).encode()),
        VALUES.map(lambda value: json.dumps(value).encode()),
        st.tuples(record, st.integers(1, 60)).map(lambda pair: pair[0][: -pair[1]]),
        st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b"")),
    )


FILES = st.sampled_from(sorted(FORMATS)).flatmap(
    lambda format: st.tuples(st.just(format), st.lists(lines_of(format), min_size=1, max_size=12))
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a good image and one that is cut off behind its header; a collator and its tiny model with CAL."""
    folder = tmp_path_factory.mktemp("fuzz")
    Image.effect_noise((24, 24), 90).convert("RGB").save(folder / "red.png")
    whole = (folder / "red.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    return folder, VisionCollator(tiny_llava_processor(), on_bad="error"), enable_cal(tiny_llava().train())


def look(place, format, lines, counts):
    """Load the lines between two good records, and learn from what comes of them."""
    folder, collator, model = place
    good = json.dumps(GOOD[format]).encode()
    lines = [line for line in lines if line.strip()]
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join([good, *lines, good]))
    report = LoadReport()
    data = load_records(path, format=format, on_bad="skip", report=report)
    assert report.accepted + report.rejected == report.total == len(lines) + 2
    assert len(data) == report.accepted
    for called, reason in report.reasons:
        assert "\n" not in called + reason
        assert len(called + reason) < 1000
    guarded = QuarantineCollator(collator, data)
    batch = guarded(list(data))
    assert len(batch["labels"]) == len(data)
    assert bool((batch["labels"] != -100).any(1).all()), "every row has something to learn"
    aside = batch.pop(QUARANTINED)
    batch.pop(LENGTH_COUNTS, None)
    loss = model(**batch).loss
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert float(loss.detach()) > 0
    model.zero_grad()
    counts.update(records=report.total, refused=report.rejected, aside=len(aside), files=1)


@pytest.fixture(autouse=True)
def quiet():
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(before)


OPTIONS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


# Whose image is found out when its batch is made
HALF = ("captions", [json.dumps({**GOOD["captions"], "file_name": "half.png"}).encode()])


def examples(place, number, counts, derandomize=False, kept=None):
    @settings(max_examples=number, derandomize=derandomize, **OPTIONS)
    @given(FILES)
    @example(HALF)
    def run(file):
        look(place, *file, counts)
        if kept is not None and file[0] == "messages":
            kept.extend([json.dumps(GOOD["messages"]).encode(), *file[1]])

    run()


def an_epoch(place, lines, out):
    """An epoch of CALTrainer over the lines: each record that was loaded is learnt from or put aside."""
    folder, collator, _ = place
    path = folder / "all.jsonl"
    path.write_bytes(b"\n".join(line for line in lines if line.strip()))
    report = LoadReport()
    data = load_records(path, format="messages", on_bad="skip", report=report)
    assert report.accepted + report.rejected == report.total
    args = sgd_config(out, 4, 1, max_steps=-1, num_train_epochs=1, on_bad="skip", max_bad_records=0.99)
    trainer = CALTrainer(tiny_llava(), args, train_dataset=data, processing_class=collator.processor)
    trainer.train()
    assert trainer.state.global_step == math.ceil(report.accepted / 4), "no batch is lost"
    aside = [one["id"] for one in read_quarantine(out / "quarantine.jsonl")]
    assert sum(one.get("records_dropped", 0) for one in trainer.state.log_history) == len(aside)
    return report, aside


def test_some_malformed_records(place, tmp_path):
    counts, good = Counter(), json.dumps(GOOD["messages"]).encode()
    kept = [json.dumps({**GOOD["messages"], "images": ["half.png"]}).encode(), *[good] * 20]
    assert set(GOOD) == set(FORMATS)
    examples(place, 100, counts, derandomize=True, kept=kept)
    report, aside = an_epoch(place, kept, tmp_path)
    assert report.accepted >= 20
    assert 1 <= len(aside) < report.accepted
    assert counts["records"] >= 500
    assert counts["refused"] >= 100
    assert counts["aside"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_and_as_many_as_there_is_time_for(place, tmp_path):
    counts, end = Counter(), time.monotonic() + 60 * float(os.environ.get("SEECAL_FUZZ_MINUTES", "0"))
    kept = []
    while counts["records"] < 10_000 or time.monotonic() < end:
        examples(place, 500, counts, kept=kept)
    report, aside = an_epoch(place, kept, tmp_path)
    print(dict(counts), "an epoch:", report.accepted, "loaded,", len(aside), "put aside")
